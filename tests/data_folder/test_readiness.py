"""`data_folder.readiness`: checks run once for all who ask, once a second at most, and never for long."""

import asyncio
import logging
import threading
import time

import pytest

from prefix_service.data_folder import readiness as module
from prefix_service.data_folder.readiness import Readiness
from prefix_service.errors import OutOfSpace, StorageFailed


class Disk:
    """A check that is counted, and that a test makes fail or hang."""

    def __init__(self) -> None:
        self.looks = 0
        self.reason: str | None = None
        self.answers = threading.Event()
        self.answers.set()

    def __call__(self) -> None:
        self.looks += 1
        self.answers.wait(60)
        if self.reason is not None:
            raise OutOfSpace(self.reason)


async def reason(readiness: Readiness) -> str | None:
    try:
        await readiness.require()
    except StorageFailed as error:
        return error.message
    return None


async def test_many_callers_cause_one_look() -> None:
    """In parallel and within a second."""
    disk = Disk()
    readiness = Readiness([disk])
    assert await asyncio.gather(*(reason(readiness) for _ in range(100))) == [None] * 100
    assert await reason(readiness) is None
    assert disk.looks == 1


async def test_what_is_wrong_is_said_and_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever class of error it was, it is an unavailability."""
    monkeypatch.setattr(module, "_REMEMBERED", 0.0)
    caplog.set_level(logging.INFO, "prefix_service")
    disk, sound = Disk(), Disk()
    readiness = Readiness([sound, disk])
    for said in (None, "no space left", "no space left", None, None):
        disk.reason = said
        assert await reason(readiness) == said
    assert [record.message for record in caplog.records] == ["not ready: no space left", "ready again"]
    assert (disk.looks, sound.looks) == (5, 5)


async def test_a_hanging_check_is_a_reason_and_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits longer than the deadline, and no second thread hangs; once it answers, all is well again."""
    monkeypatch.setattr(module, "_REMEMBERED", 0.0)
    disk = Disk()
    readiness = Readiness([disk], deadline=0.2)
    disk.answers.clear()
    began = time.monotonic()
    for _ in range(20):
        assert await reason(readiness) == "the disk or the catalog has not answered within 0.2 seconds"
    assert time.monotonic() - began >= 0.2
    assert disk.looks == 1
    disk.answers.set()
    await asyncio.wait([readiness._running] if readiness._running else [])
    assert await reason(readiness) is None
