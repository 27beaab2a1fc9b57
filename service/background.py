"""Work that goes on in a thread while a block runs."""

import contextlib
import threading
from collections.abc import Callable, Iterator

_LONGEST_END = 5.0  # seconds that the end of a block waits for its thread


@contextlib.contextmanager
def in_background(name: str, work: Callable[[threading.Event], None]) -> Iterator[None]:
    """Call `work` in a thread of that name; the event that it is given is set when the block ends."""
    stop = threading.Event()
    thread = threading.Thread(target=work, args=(stop,), name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(_LONGEST_END)
