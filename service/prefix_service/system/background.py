"""Runs work in a thread while a block runs."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Final

log = logging.getLogger("prefix_service")

_LONGEST_END: Final = 5.0  # seconds that the end of the block waits for the thread
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 60.0  # seconds between a failure and the next attempt


@contextlib.contextmanager
def in_background(name: str, work: Callable[[threading.Event], None], pause: float = _FIRST_PAUSE) -> Iterator[None]:
    """Calls `work` in a thread called `name` while the block runs; sets the event that `work` receives when the block
    ends.

    If `work` raises, the error is logged and `work` is called again after `pause` seconds. The pause doubles with each
    failure, up to a minute, and is reset once `work` has run for a minute.
    """
    stop = threading.Event()
    thread = threading.Thread(target=_keep_going, args=(name, work, stop, pause), name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(_LONGEST_END)


def _keep_going(name: str, work: Callable[[threading.Event], None], stop: threading.Event, first_pause: float) -> None:
    pause = first_pause
    while True:
        began = time.monotonic()
        try:
            work(stop)
        except Exception:
            if time.monotonic() - began >= _LONGEST_PAUSE:
                pause = first_pause
            log.exception("background work failed, and is started again", extra={"work": name, "seconds": pause})
            if stop.wait(pause):
                return
            pause = min(2 * pause, _LONGEST_PAUSE)
        else:
            return
