"""Keeps vLLM's steps without work apart, so that the threads that ask and fetch get the interpreter's lock.

vLLM's engine process sleeps for a millisecond after such a step (`EngineCoreProc._process_engine_step`); an engine in
the caller's process (`LLM()` with `VLLM_ENABLE_V1_MULTIPROCESSING=0`) takes the next step immediately.
"""

import time
from collections.abc import Callable
from typing import Final

_APART: Final = 0.001  # seconds


class Pace:
    """The time between steps without work; used by one thread."""

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._clock, self._sleep = clock, sleep
        self._last = -_APART

    def rest(self) -> None:
        """Waits until a millisecond has passed since the last call returned: not at all where vLLM has waited."""
        left = self._last + _APART - self._clock()
        if left > 0:
            self._sleep(left)
        self._last = self._clock()
