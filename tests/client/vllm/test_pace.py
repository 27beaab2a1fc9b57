"""Steps without work do not follow each other faster than in vLLM's engine process."""

import pytest

from prefix_service.client.vllm.pace import Pace


def test_a_step_without_work_waits_only_if_the_last_was_just_now() -> None:
    """A step rests until a millisecond after the last one's rest, and not at all if vLLM has slept as long itself."""
    now, rests = 0.0, list[float]()

    def sleep(seconds: float) -> None:
        nonlocal now
        rests.append(seconds)
        now += seconds

    pace = Pace(lambda: now, sleep)
    for own in (0.0, 0.0003, 0.0, 0.0012):
        now += own
        pace.rest()
    assert rests == pytest.approx([0.0007, 0.001])
