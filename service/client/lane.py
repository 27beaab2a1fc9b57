"""The way of tensors: an answer's body is received into memory that is allocated once, over connections that stay.

httpx hands a body over in small pieces, each a copy, at a third of the speed; it carries everything else.
"""

import contextlib
import select
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Final, Protocol
from urllib.parse import urlencode

from service.client.connection import Connection, time_left
from service.client.http1 import MAX_HEAD, Head, read_carefully, read_plain
from service.client.protocol import Request

_MOST_IDLE: Final = 32
_HASHED_AT_ONCE: Final = 1 << 20  # still in the processor's cache, while the kernel receives the next

Place = Callable[[Head], memoryview]
"""Where the body of an answer with this head goes: as many bytes as its length."""


class Hasher(Protocol):
    """What `hashlib` makes."""

    def update(self, data: memoryview, /) -> None:
        """The next bytes."""


class NoAnswer(Exception):
    """A connection that was idle had ended before a byte of the answer came: another one may be tried."""


class Interrupt:
    """Breaks off exchanges from another thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._watched: set[socket.socket] = set()
        self._is_broken = False

    @contextlib.contextmanager
    def watching(self, link: socket.socket) -> Iterator[None]:
        """Break off what happens on this socket in the block.

        Raises:
            ConnectionAbortedError: it was broken off before.
        """
        with self._lock:
            if self._is_broken:
                raise ConnectionAbortedError("broken off")
            self._watched.add(link)
        try:
            yield
        finally:
            with self._lock:
                self._watched.discard(link)

    def break_off(self) -> None:
        """End what is under way, and what would begin."""
        with self._lock:
            self._is_broken = True
            for link in self._watched:
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(link, socket.SHUT_RDWR)  # TLS's own would take its state from the reader


class Link:
    """One connection, and where heads arrive."""

    def __init__(self, connected: socket.socket) -> None:
        self.socket = connected
        self.stays = False
        """Whether it has carried an answer, and may carry another."""
        self._scratch = bytearray(MAX_HEAD)

    def is_readable(self) -> bool:
        """Whether something has come unasked: as a rule, the end."""
        poll = select.poll()
        poll.register(self.socket, select.POLLIN)
        return bool(poll.poll(0))

    def exchange(self, request: bytes, place: Place, until: float, hasher: Hasher | None) -> tuple[Head, memoryview]:
        """Send a GET and receive its answer.

        Raises:
            NoAnswer: this connection was used before, and ended without a byte.
            OSError: as `Lane.exchange`.
        """
        scratch = memoryview(self._scratch)
        count = self._begin(request, scratch, until)
        while (stop := self._scratch.find(b"\r\n\r\n", 0, count)) < 0 and count < MAX_HEAD:
            count += self._receive(scratch[count:], until)
        head = read_plain(bytes(scratch[: stop + 4])) if stop >= 0 else None
        if head is None:
            return self._carefully(bytes(scratch[:count]), place, until, hasher)
        body, arrived = place(head), count - stop - 4
        if arrived > head.length:
            raise ConnectionError("the answer is longer than its Content-Length")
        body[:arrived] = scratch[stop + 4 : count]
        self._fill(body, arrived, until, hasher)
        self.stays = head.keeps_alive
        return head, body

    def _begin(self, request: bytes, scratch: memoryview, until: float) -> int:
        """Send, and the first bytes of the answer."""
        try:
            self.socket.settimeout(time_left(until))
            self.socket.sendall(request)
            return self._receive(scratch, until)
        except TimeoutError:
            raise
        except OSError as error:
            if self.stays:
                raise NoAnswer from error
            raise

    def _fill(self, body: memoryview, position: int, until: float, hasher: Hasher | None) -> None:
        if hasher is None:
            while position < len(body):
                position += self._receive(body[position:], until)
            return
        hasher.update(body[:position])
        while position < len(body):
            count = self._receive(body[position : position + _HASHED_AT_ONCE], until)
            hasher.update(body[position : position + count])
            position += count

    def _receive(self, view: memoryview, until: float) -> int:
        self.socket.settimeout(time_left(until))
        count = self.socket.recv_into(view)
        if not count:
            raise ConnectionError("the connection ended before the answer did")
        return count

    def _carefully(self, begun: bytes, place: Place, until: float, hasher: Hasher | None) -> tuple[Head, memoryview]:
        def more() -> bytes:
            self.socket.settimeout(time_left(until))
            return self.socket.recv(MAX_HEAD)

        head, received = read_carefully(begun, more)
        body = place(head)
        body[:] = received
        if hasher is not None:
            hasher.update(body)
        self.stays = head.keeps_alive
        return head, body


class Lane:
    """Exchanges with one service over connections that stay; safe to share between threads."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._path = connection.url.path.rstrip("/")
        host = connection.url.netloc.decode("ascii").rpartition("@")[2]
        self._fixed = _lines({"Host": host, **connection.headers}) + b"\r\n"
        self._idle: list[Link] = []
        self._lock = threading.Lock()
        self._is_closed = False

    def exchange(
        self,
        request: Request,
        place: Place,
        until: float,
        interrupt: Interrupt,
        *,
        headers: Mapping[str, str] | None = None,
        hasher: Hasher | None = None,
    ) -> tuple[Head, memoryview]:
        """Send a GET, with more `headers`, and receive its answer's body where `place` says, before the moment `until`
        of `time.monotonic`; `hasher` sees the body as it comes.

        Raises:
            OSError: no answer, or not all of it; TimeoutError if it did not come in time.
        """
        message = self._message(request, headers or {})
        while True:
            link = self._take(until)
            try:
                with interrupt.watching(link.socket):
                    answer = link.exchange(message, place, until, hasher)
            except NoAnswer:
                link.socket.close()
                continue
            except BaseException:
                link.socket.close()
                raise
            self._give_back(link)
            return answer

    def _message(self, request: Request, headers: Mapping[str, str]) -> bytes:
        query = f"?{urlencode(request.params)}" if request.params else ""
        start = f"GET {self._path}{request.path}{query} HTTP/1.1\r\n"
        return start.encode("ascii") + _lines({**request.headers, **headers}) + self._fixed

    def _take(self, until: float) -> Link:
        while True:
            with self._lock:
                link = self._idle.pop() if self._idle else None
            if link is None:
                return Link(self._connection.dial(until))
            if not link.is_readable():
                return link
            link.socket.close()

    def _give_back(self, link: Link) -> None:
        with self._lock:
            if link.stays and not self._is_closed and len(self._idle) < _MOST_IDLE:
                self._idle.append(link)
                return
        link.socket.close()

    def close(self) -> None:
        """Close every connection; one in use closes when its exchange ends."""
        with self._lock:
            self._is_closed = True
            idle, self._idle = self._idle, []
        for link in idle:
            link.socket.close()


def _lines(headers: Mapping[str, str]) -> bytes:
    return "".join(f"{name}: {value}\r\n" for name, value in headers.items()).encode("latin-1")
