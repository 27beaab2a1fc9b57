"""Receives a large body as several ranges in parallel, over as many connections (RFC 9110, section 14)."""

import re
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Final

from prefix_service.client.protocol import Request
from prefix_service.client.transport.http1 import Head
from prefix_service.client.transport.link import AllocateBody, Observer
from prefix_service.client.transport.pool import Exchanges, Interrupt

PIECE: Final = 32 << 20
"""Bytes of a range; a larger body is received as several ranges."""

_CONTENT_RANGE: Final = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})")


class Changed(Exception):
    """The service has another body now, or does not answer with the requested range."""


class Pieces:
    """One body, received as ranges by several threads. An instance is used once.

    `observe` sees each piece when it arrives, in the thread that received it.
    """

    def __init__(
        self, pool: Exchanges, request: Request, until: float, interrupt: Interrupt, observe: Observer | None = None
    ) -> None:
        self._observe = observe
        self._pool, self._request, self._until, self._interrupt = pool, request, until, interrupt
        self._lock = threading.Lock()
        self._failure: BaseException | None = None
        self._threads: list[threading.Thread] = []
        self._memory = memoryview(b"")
        self._starts: Iterator[int] = iter(())
        self._etag = ""

    def receive(self, allocate: Callable[[Head], memoryview], connections: int) -> tuple[Head, memoryview]:
        """Returns head and body; the body is whole, or that of an answer with another status than 206.

        Raises:
            Changed: the body changed during the transfer.
            OSError: an answer is missing or incomplete.
        """

        def first(head: Head) -> memoryview:
            if head.status != 206:
                return allocate(head)
            total = self._plan(head)
            self._memory = allocate(Head(head.status, head.headers, total, head.keeps_alive))
            needed = min(connections, -(-total // PIECE)) - 1
            self._threads = [threading.Thread(target=self._take, daemon=True) for _ in range(needed)]
            for thread in self._threads:
                thread.start()
            return self._memory[: head.length]

        try:
            try:
                head, body = self._exchange(first, {"Range": f"bytes=0-{PIECE - 1}"})
                if head.status != 206:
                    return head, body
                self._take()
            finally:
                self._starts = iter(())  # after a failure, the other threads end with their current range
                for thread in self._threads:
                    thread.join()
            if self._failure is not None:
                raise self._failure
            return head, self._memory
        finally:
            self._failure = None  # it refers to this object, whose memory would stay until garbage is collected

    def _plan(self, head: Head) -> int:
        """Returns the length of the whole body, whose first range has this head, and schedules its other ranges."""
        start, stop, total = _content_range(head)
        if (start, stop) != (0, min(PIECE, total)) or head.length != stop:
            raise Changed("another range than the one that was asked for")
        self._etag = head.headers.get("etag", "")
        if total > PIECE and not self._etag.startswith('"'):
            raise Changed("no strong entity tag holds the ranges together")
        self._starts = iter(range(PIECE, total, PIECE))
        return total

    def _take(self) -> None:
        """Receives one range after another until none is left."""
        try:
            while self._failure is None:
                with self._lock:
                    start = next(self._starts, None)
                if start is None:
                    return
                self._piece(start)
        except BaseException as error:  # noqa: BLE001 - raised again by `receive`
            self._failure = error

    def _piece(self, start: int) -> None:
        memory = self._memory[start : start + PIECE]
        stop = start + len(memory)

        def at(head: Head) -> memoryview:
            if head.status != 206 or head.headers.get("etag") != self._etag:
                raise Changed("another body")
            if _content_range(head) != (start, stop, len(self._memory)) or head.length != len(memory):
                raise Changed("another range than the one that was asked for")
            return memory

        self._exchange(at, {"Range": f"bytes={start}-{stop - 1}", "If-Range": self._etag})

    def _exchange(self, allocate: AllocateBody, headers: Mapping[str, str]) -> tuple[Head, memoryview]:
        exchange = self._pool.exchange
        return exchange(self._request, allocate, self._until, self._interrupt, headers=headers, observe=self._observe)


def _content_range(head: Head) -> tuple[int, int, int]:
    """Returns start, stop and length of the whole body."""
    match = _CONTENT_RANGE.fullmatch(head.headers.get("content-range", ""))
    if match is None:
        raise Changed("a range that does not say which")
    return int(match[1]), int(match[2]) + 1, int(match[3])
