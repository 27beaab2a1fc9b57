"""One connection and an exchange over it, as steps that yield when they would block, so that a thread and an event loop
can both carry them out.

`SO_RCVLOWAT` (socket(7)) tells the kernel how many bytes are worth a waking, and gives the receiver that much room.
"""

import asyncio
import select
import socket
import ssl
from collections.abc import Callable, Generator, Iterable
from enum import Enum, auto
from functools import partial
from typing import Final, TypeVar

from prefix_service.client.transport.dialling import time_left
from prefix_service.client.transport.http1 import MAX_HEAD, Head, read_carefully, read_plain

T = TypeVar("T")

_WORTH_WAKING: Final = 512 << 10  # bytes
_AT_ONCE: Final = 4 << 20  # bytes after which an event loop may do something else
_OBSERVED_AT_ONCE: Final = 256 << 10  # still in the processor's cache when the observer sees it
MOST_UNDECLARED: Final = 1 << 30
"""Bytes that a body may have that does not declare its length."""

AllocateBody = Callable[[Head], memoryview]
"""Where the body of an answer with this head goes: as many bytes as its length."""

Observer = Callable[[memoryview], None]
"""Sees each piece of a body in order, once it has arrived in its place."""


class Wait(Enum):
    """Why steps pause: the socket must become readable, writable or either, or others may take a turn."""

    READABLE = auto()
    WRITABLE = auto()
    EITHER = auto()
    TURN = auto()


Steps = Generator[Wait, None, T]


class Link:
    """One connection, and where heads arrive."""

    def __init__(self, connected: socket.socket) -> None:
        connected.setblocking(False)
        self.socket = connected
        self.stays = False
        """Whether it has carried an answer, and may carry another."""
        self.has_begun = False
        """Whether an answer to the latest request has begun to arrive."""
        self._scratch = bytearray(MAX_HEAD)
        self._is_torn = False  # the answer came before the whole request was sent
        self._least = 1
        # What TLS has taken out of the socket no longer counts there.
        self._says_least = connected.family != socket.AF_UNIX and not isinstance(connected, ssl.SSLSocket)

    def is_readable(self) -> bool:
        """Whether something has come unasked: as a rule, the end."""
        poll = select.poll()
        poll.register(self.socket, select.POLLIN)
        return bool(poll.poll(0))

    def begin(self, request: bytes, body: Iterable[bytes] = ()) -> Steps[int]:
        """Send a request, and receive the first bytes of its answer; returns their number.

        An answer that comes before the whole body is sent ends the sending.

        Raises:
            OSError: the connection ended without an answer.
        """
        self.has_begun = False
        rest = memoryview(request)
        while rest:
            rest = rest[(yield from self._waiting(partial(self.socket.send, rest), Wait.WRITABLE)) :]
        for piece in body:
            count = yield from self._send_unless_answered(memoryview(piece))
            if count is not None:
                self._is_torn = True
                return count
            yield Wait.TURN
        return (yield from self._receive(memoryview(self._scratch)))

    def finish(
        self, count: int, allocate: AllocateBody, observe: Observer | None, most: int = MOST_UNDECLARED
    ) -> Steps[tuple[Head, memoryview]]:
        """Receive the answer of which `begin` has received `count` bytes; its body goes where `place` says, and
        `observe` sees it as it comes. A body that does not declare its length may have `most` bytes.

        Raises:
            OSError: not all of the answer came.
        """
        self.has_begun = True
        scratch = memoryview(self._scratch)
        while (stop := self._scratch.find(b"\r\n\r\n", 0, count)) < 0 and count < MAX_HEAD:
            count += yield from self._receive(scratch[count:])
        head = read_plain(bytes(scratch[: stop + 4])) if stop >= 0 else None
        if head is None:
            return (yield from self._carefully(bytes(scratch[:count]), allocate, observe, most))
        body, arrived = allocate(head), count - stop - 4
        if arrived > head.length:
            raise ConnectionError("the answer is longer than its Content-Length")
        body[:arrived] = scratch[stop + 4 : count]
        yield from self._fill(body, arrived, observe)
        self._wake_at(1)
        self.stays = head.keeps_alive and not self._is_torn
        return head, body

    def _send_unless_answered(self, rest: memoryview) -> Steps[int | None]:
        """Send a piece of a body. If an answer comes first, or the connection ends, returns the number of bytes that
        have come."""
        while rest:
            try:
                rest = rest[self.socket.send(rest) :]
            except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                try:
                    return self._none_is_the_end(self.socket.recv_into(self._scratch))
                except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                    yield Wait.EITHER
            except OSError:  # the peer has closed; it may have said why before
                return (yield from self._receive(memoryview(self._scratch)))
        return None

    def _fill(self, body: memoryview, position: int, observe: Observer | None) -> Steps[None]:
        at_once = _AT_ONCE
        if observe is not None:
            at_once = _OBSERVED_AT_ONCE
            observe(body[:position])
        while position < len(body):
            self._wake_at(min(_WORTH_WAKING, len(body) - position))
            count = yield from self._receive(body[position : position + at_once])
            if observe is not None:
                observe(body[position : position + count])
            position += count
            yield Wait.TURN

    def _receive(self, view: memoryview) -> Steps[int]:
        return self._none_is_the_end((yield from self._waiting(partial(self.socket.recv_into, view), Wait.READABLE)))

    @staticmethod
    def _none_is_the_end(count: int) -> int:
        if not count:
            raise ConnectionError("the connection ended before the answer did")
        return count

    def _waiting(self, call: Callable[[], int], wait: Wait) -> Steps[int]:
        """What the call returns as soon as it need not block; TLS may have to read to write, and to write to read."""
        while True:
            try:
                return call()
            except ssl.SSLWantReadError:
                yield Wait.READABLE
            except ssl.SSLWantWriteError:
                yield Wait.WRITABLE
            except BlockingIOError:
                yield wait

    def _wake_at(self, least: int) -> None:
        if self._says_least and least != self._least:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, least)
            self._least = least

    def _carefully(
        self, begun: bytes, allocate: AllocateBody, observe: Observer | None, most: int
    ) -> Steps[tuple[Head, memoryview]]:
        reading = read_carefully(begun, most)
        try:
            next(reading)
            while True:
                count = yield from self._waiting(partial(self.socket.recv_into, self._scratch), Wait.READABLE)
                reading.send(bytes(self._scratch[:count]))
                yield Wait.TURN
        except StopIteration as end:
            head, received = end.value
        body = allocate(head)
        body[:] = received
        if observe is not None:
            observe(body)
        self.stays = head.keeps_alive and not self._is_torn
        return head, body


def carry_out(steps: Steps[T], link: socket.socket, until: float) -> T:
    """Take the steps in this thread, before the moment `until` of `time.monotonic`.

    Raises:
        TimeoutError: they were not done by then.
    """
    poll: select.poll | None = None
    try:
        while True:
            wait = next(steps)
            left = time_left(until)
            if wait is not Wait.TURN:
                poll = poll or select.poll()
                poll.register(link, _EVENTS[wait])
                while not poll.poll(1000 * left):
                    left = time_left(until)
    except StopIteration as end:
        result: T = end.value
        return result


_EVENTS: Final = {
    Wait.READABLE: select.POLLIN,
    Wait.WRITABLE: select.POLLOUT,
    Wait.EITHER: select.POLLIN | select.POLLOUT,
}


async def carry_out_on_loop(steps: Steps[T], link: socket.socket, until: float) -> T:
    """Take the steps of a request without a body on the running event loop, before the moment `until` of
    `time.monotonic`; other tasks run while they wait.

    Raises:
        TimeoutError: they were not done by then.
    """
    loop, fd = asyncio.get_running_loop(), link.fileno()
    ways = {
        Wait.READABLE: (loop.add_reader, loop.remove_reader),
        Wait.WRITABLE: (loop.add_writer, loop.remove_writer),
    }
    try:
        while True:
            wait = next(steps)
            left = time_left(until)
            if wait is Wait.TURN:
                await asyncio.sleep(0)
                continue
            add, remove = ways[wait]
            ready = loop.create_future()
            add(fd, _settle, ready)
            timer = loop.call_later(left, _expire, ready)
            try:
                await ready
            finally:
                timer.cancel()
                remove(fd)
    except StopIteration as end:
        result: T = end.value
        return result


def _settle(ready: "asyncio.Future[None]") -> None:
    if not ready.done():  # it may be called again before its reader is gone
        ready.set_result(None)


def _expire(ready: "asyncio.Future[None]") -> None:
    if not ready.done():
        ready.set_exception(TimeoutError("timed out"))
