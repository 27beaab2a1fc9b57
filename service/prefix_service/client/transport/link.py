"""A sans-I/O exchange over one connection: it yields what it must wait for, so that a thread and an event loop can
drive the same code.

`SO_RCVLOWAT` (socket(7)) sets how many bytes must arrive before the kernel wakes the receiver, and gives it that
much room.
"""

import asyncio
import contextlib
import select
import socket
import ssl
from collections.abc import Callable, Generator, Iterable, Sequence
from enum import Enum, auto
from functools import partial
from typing import Final, TypeVar

from prefix_service.client.transport.dialling import time_left
from prefix_service.client.transport.http1 import MAX_HEAD, Head, read_carefully, read_plain
from prefix_service.errors import InvalidResponse

T = TypeVar("T")

_WORTH_WAKING: Final = 512 << 10  # bytes
_AT_ONCE: Final = 4 << 20  # bytes after which an event loop may do other work
_OBSERVED_AT_ONCE: Final = 256 << 10  # bytes that are still in the processor's cache when the observer sees them
MOST_UNDECLARED: Final = 1 << 30
"""The most bytes of a body that does not declare its length."""

MOST_JSON: Final = 32 << 20
"""The most bytes of an answer without tensors."""
_MOST_PROBLEM: Final = 1 << 20  # bytes of an error response

AllocateBody = Callable[[Head], memoryview]
"""Allocates the memory of a body, as many bytes as the length in its answer's head."""

Observer = Callable[[memoryview], None]
"""Sees each piece of a body in order, once it is in memory."""


def allocate_json(head: Head) -> memoryview:
    """Returns memory for an answer without tensors.

    Raises:
        InvalidResponse: it is longer than any such answer of the service.
    """
    most = MOST_JSON if head.status < 300 else _MOST_PROBLEM
    if head.length > most:
        raise InvalidResponse(f"status {head.status} with {head.length} bytes, more than {most}: is the URL right?")
    return memoryview(bytearray(head.length))


class Wait(Enum):
    """The reasons to wait: the socket must become readable, writable or either, or a turn of other work."""

    READABLE = auto()
    WRITABLE = auto()
    EITHER = auto()
    TURN = auto()


Steps = Generator[Wait, None, T]


class Link:
    """One connection, and the memory in which heads are received."""

    def __init__(self, connected: socket.socket) -> None:
        connected.setblocking(False)
        self.socket = connected
        self.stays = False
        """Whether the connection has carried an answer, and may carry another."""
        self.has_begun = False
        """Whether an answer to the latest request has begun to arrive."""
        self._scratch = bytearray(MAX_HEAD)
        self._is_torn = False  # the answer came before the whole request was sent
        self._least = 1
        # Bytes that TLS has taken out of the socket no longer count there.
        self._says_least = connected.family != socket.AF_UNIX and not isinstance(connected, ssl.SSLSocket)

    def is_readable(self) -> bool:
        """Returns whether bytes have arrived unasked, or the connection has ended."""
        poll = select.poll()
        poll.register(self.socket, select.POLLIN)
        return bool(poll.poll(0))

    def begin(self, request: bytes, body: Iterable[bytes] = ()) -> Steps[int]:
        """Sends a request, and receives the first bytes of its answer; returns their number.

        An answer that arrives before the whole body is sent ends the sending.

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
        """Receives the rest of an answer whose first `count` bytes `begin` has received; returns its head and body.

        `allocate` returns memory for the body, and `observe` sees its pieces as they arrive. A body without a declared
        length may have `most` bytes.

        Raises:
            OSError: the answer is malformed or incomplete.
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

    def more(self) -> Steps[bytes]:
        """Receives more bytes of an answer that `begin` has begun to receive; none if the connection has ended."""
        count = yield from self._waiting(partial(self.socket.recv_into, self._scratch), Wait.READABLE)
        return bytes(self._scratch[:count])

    def received(self, count: int) -> bytes:
        """Returns the bytes that `begin` has received."""
        return bytes(self._scratch[:count])

    def _send_unless_answered(self, rest: memoryview) -> Steps[int | None]:
        """Sends a piece of a body.

        Returns the number of received bytes if an answer arrives first, or the connection ends; else None.
        """
        while rest:
            try:
                rest = rest[self.socket.send(rest) :]
            except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                try:
                    return self._none_is_the_end(self.socket.recv_into(self._scratch))
                except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                    yield Wait.EITHER
            except OSError:  # the peer has closed; it may have answered before
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
        """Returns the result of `call` as soon as it need not block.

        TLS may have to read to write, and to write to read.
        """
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
    """Carries out the steps in this thread before the time `until` of `time.monotonic`; returns their result.

    Raises:
        TimeoutError: they were not finished in time.
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


def carry_out_first(runs: Sequence[tuple[Steps[T], socket.socket]], until: float) -> tuple[int, T]:
    """Carries out several exchanges in this thread until the first succeeds; returns its index and its result.

    The others stay where they are, and can go on.

    Raises:
        OSError: all of them failed; TimeoutError if none succeeded before the time `until` of `time.monotonic`.
    """
    poll = select.poll()
    ready, at = list(range(len(runs))), {link.fileno(): index for index, (_, link) in enumerate(runs)}
    failed: OSError = TimeoutError("timed out")
    left = len(runs)
    while left:
        for index in ready:
            steps, link = runs[index]
            try:
                while (wait := next(steps)) is Wait.TURN:
                    time_left(until)
                poll.register(link, _EVENTS[wait])
            except StopIteration as end:
                return index, end.value
            except OSError as error:
                failed, left = error, left - 1
                with contextlib.suppress(KeyError):  # it failed before its first wait
                    poll.unregister(link)
        ready = [at[number] for number, _ in poll.poll(1000 * time_left(until))] if left else []
    raise failed


async def carry_out_on_loop(steps: Steps[T], link: socket.socket, until: float) -> T:
    """Carries out the steps of a request without a body on the running event loop; returns their result.

    Other tasks run while the steps wait.

    Raises:
        TimeoutError: they were not finished before the time `until` of `time.monotonic`.
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
    if not ready.done():  # may be called again before its reader is removed
        ready.set_result(None)


def _expire(ready: "asyncio.Future[None]") -> None:
    if not ready.done():
        ready.set_exception(TimeoutError("timed out"))
