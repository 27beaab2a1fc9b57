"""Lines for a file descriptor whose reader may be slow, or have stopped reading."""

import os
import select
import threading
import time
from collections.abc import Callable
from typing import Final

_MOST: Final = 4 << 20  # characters that wait: some 20,000 lines of a log
_PAUSE: Final = 0.005  # seconds between two writes: fewer changes of thread, and fewer calls of the system, than lines
_LONGEST_FLUSH: Final = 2.0  # seconds; nobody reads what is not read by then


class LineWriter:
    """Writes lines in a thread of its own, so whoever calls `write` never waits: a terminal that is paused (Ctrl+S, a
    copy mode of tmux) and a pipe that nobody reads stop a process that writes to them itself.

    Lines wait for the reader up to a bound; those beyond it are dropped and counted. Once the reader has read again,
    the thread calls `on_dropped` with their number. Safe to share between threads. A descriptor that cannot be written
    to, on a full disk or without a reader, fails nobody.
    """

    def __init__(self, descriptor: int, on_dropped: Callable[[int], None], most: int = _MOST) -> None:
        self._descriptor, self._on_dropped, self._most = descriptor, on_dropped, most
        self._lock = threading.RLock()  # a finalizer may log while this thread does
        self._written = threading.Condition(self._lock)
        self._wanted = threading.Event()
        self._thread: threading.Thread | None = None
        self._pending: list[str] = []
        self._size = self._dropped = 0
        self._is_writing = False

    def write(self, line: str) -> None:
        """Take a line, or several in one text, without the end of the last."""
        with self._lock:
            if self._size >= self._most:
                self._dropped += 1
                return
            self._pending.append(line)
            self._size += len(line)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="log", daemon=True)
                self._thread.start()
        if not self._wanted.is_set():
            self._wanted.set()

    def flush(self, seconds: float = _LONGEST_FLUSH) -> bool:
        """Wait until every line is written; returns whether it is, after at most so many seconds."""
        with self._written:
            return self._written.wait_for(lambda: not self._pending and not self._is_writing, seconds)

    def _run(self) -> None:
        while True:
            self._wanted.wait()
            self._wanted.clear()
            with self._lock:
                lines, self._pending, self._size = self._pending, [], 0
                dropped, self._dropped = self._dropped, 0
                self._is_writing = True
            if lines:
                self._write_all(("\n".join(lines) + "\n").encode(errors="backslashreplace"))
            if dropped:
                self._on_dropped(dropped)
            with self._written:
                self._is_writing = False
                self._written.notify_all()
            time.sleep(_PAUSE)

    def _write_all(self, data: bytes) -> None:
        left = memoryview(data)
        while left:
            try:
                left = left[os.write(self._descriptor, left) :]
            except BlockingIOError:  # another program that has this terminal or pipe made it so
                select.select([], [self._descriptor], [])
            except OSError:
                return
