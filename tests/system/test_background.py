"""`system.background`: a thread whose work fails is not lost."""

import logging
import threading

import pytest

from prefix_service.system.background import in_background


def test_work_that_raises_begins_again(caplog: pytest.LogCaptureFixture) -> None:
    """Each failure is logged with its traceback; the third beginning goes on until the block ends."""
    begun, goes_on, ended = list[str](), threading.Event(), threading.Event()

    def work(stop: threading.Event) -> None:
        begun.append(threading.current_thread().name)
        if len(begun) < 3:
            raise ZeroDivisionError(f"failure {len(begun)}")
        goes_on.set()
        assert stop.wait(60)
        ended.set()

    with in_background("a work", work, pause=0.01):
        assert goes_on.wait(60)
    assert ended.is_set()
    assert begun == ["a work"] * 3
    failures = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert [str(record.exc_info[1]) for record in failures if record.exc_info] == ["failure 1", "failure 2"]
    assert [(vars(record)["work"], vars(record)["seconds"]) for record in failures] == [
        ("a work", 0.01),
        ("a work", 0.02),
    ]


def test_the_end_does_not_wait_for_a_pause() -> None:
    """Nor does the work begin again after it."""
    begun, failing = list[int](), threading.Event()

    def work(_: threading.Event) -> None:
        begun.append(1)
        failing.set()
        raise ZeroDivisionError

    with in_background("a work", work, pause=3600):
        assert failing.wait(60)
    assert begun == [1]
    assert not any(thread.name == "a work" for thread in threading.enumerate())
