"""Connections: what a peer may do before and beside a request, whichever parser reads it.

uvicorn's protocols bound neither the time of a head nor that of a reader, and its `httptools` no size; what is
malformed they answer in plain text. Here both do the same. A request that is on its way to the app, and an answer that
is read, cost one look at the names of the header fields; the rest is one timer for each connection.
"""

import asyncio
import http
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Final, Literal, cast

import h11
import structlog
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from service.api.gathering import GatheringTransport
from service.api.patience import Patience
from service.api.problems import problem
from service.api.responses import DRAIN
from service.errors import HeaderFieldsTooLarge, MalformedRequest, PrefixServiceError, RequestTimeout
from service.settings import Settings

MAX_HEAD_BYTES: Final = 64 << 10
MAX_HEAD_FIELDS: Final = 100

KEEP_ALIVE: Final = 75
"""Seconds that an idle connection stays: longer than the 60 for which proxies in front (nginx, AWS) keep theirs, so
that the side that sends requests is the one that closes. Workers keep theirs open too."""

_LOOKS: Final = 8
"""How often the timer looks at a connection within the shorter of its deadlines: they hold within this part."""

_LINGER: Final = 2.0
"""Seconds in which a peer may read a refusal while it still sends: data that is not read would reset the connection."""

log: structlog.stdlib.BoundLogger = structlog.stdlib.get_logger("prefix_service")

Fields = Sequence[tuple[bytes, bytes]]


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Seconds for a head to arrive, and for an answer to be read."""

    receive: float
    send: float


def protocol_class(parser: Literal["httptools", "h11"], deadlines: Deadlines) -> type[asyncio.Protocol]:
    """What uvicorn takes as `http`: it is only ever called."""
    made = partial(HttpToolsConnection if parser == "httptools" else H11Connection, deadlines)
    return cast("type[asyncio.Protocol]", made)


def connection_class(settings: Settings) -> type[asyncio.Protocol]:
    """That of a service with these settings."""
    return protocol_class(settings.parser, Deadlines(settings.receive_timeout, settings.send_timeout))


def connection_from_environment(**uvicorn: Any) -> asyncio.Protocol:
    """For worker processes, which get their settings from the environment, and this by its name: a class that came to
    them pickled would bring torch along before they answer the one who started them, who kills what is silent."""
    return _of_this_process()(**uvicorn)


@cache
def _of_this_process() -> type[asyncio.Protocol]:
    return connection_class(Settings())


class _Guarded(asyncio.Protocol):
    """What both parsers' protocols get; goes in front of one of uvicorn's."""

    loop: asyncio.AbstractEventLoop
    transport: asyncio.Transport
    flow: FlowControl
    cycle: Any  # of the newest request; None before the first
    client: tuple[str, int] | None
    server_state: ServerState
    timeout_keep_alive_task: asyncio.TimerHandle | None
    app_state: dict[str, Any]

    def __init__(self, deadlines: Deadlines, **uvicorn: Any) -> None:
        self._deadlines = deadlines
        self._every = min(deadlines.receive, deadlines.send) / _LOOKS
        self._timer: asyncio.TimerHandle | None = None
        self._waited, self._waited_after = 0.0, None
        self._reader = Patience(deadlines.send)
        self._unsent = self._sent = 0
        self._is_refused = False
        super().__init__(**uvicorn)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin to look at it."""
        gathering = GatheringTransport(cast("asyncio.Transport", transport), self.loop)
        super().connection_made(cast("asyncio.Transport", gathering))
        # What an answer holds in memory it holds until the connection can take more.
        self.app_state = {**self.app_state, DRAIN: self.flow.drain}
        self._timer = self.loop.call_later(self._every, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """More than the high-water mark is unsent."""
        self._unsent = self.transport.get_write_buffer_size()
        super().pause_writing()

    def resume_writing(self) -> None:
        """It was sent, down to the low-water mark."""
        self._sent += self._unsent - self.transport.get_write_buffer_size()
        super().resume_writing()

    def send_400_response(self, _message: str) -> None:
        """uvicorn's word for everything that its parser refuses."""
        self._refuse(_reason(sys.exc_info()[1]))

    def _look(self) -> None:
        if self._is_read_too_slowly():
            log.info("a reader was cut off", peer=self._peer, seconds=self._deadlines.send)
            self.transport.abort()
            return
        self._timer = self.loop.call_later(self._every, self._look)
        if self._is_awaited_too_long():
            seconds = self._deadlines.receive
            self._refuse(RequestTimeout(f"no complete head of a request within {seconds:g} seconds: send it anew"))

    def _is_read_too_slowly(self) -> bool:
        unsent = self.transport.get_write_buffer_size()
        if not unsent:
            self._reader.renew()
            return False
        if self.flow.write_paused:
            self._sent += self._unsent - unsent
            self._unsent = unsent
        self._reader.spend(self._every, self._sent)
        self._sent = 0
        return self._reader.left <= 0

    def _is_awaited_too_long(self) -> bool:
        """Of a head, or of the rest of a body that was answered early; uvicorn's timer ends idle connections."""
        cycle = self.cycle
        if (cycle is not None and not cycle.response_complete) or self.timeout_keep_alive_task is not None:
            self._waited = 0
            return False
        if cycle is not self._waited_after:  # requests came and went meanwhile
            self._waited, self._waited_after = 0, cycle
            return False
        self._waited += self._every
        return self._waited >= self._deadlines.receive

    def _refuse(self, error: PrefixServiceError) -> None:
        if self._is_refused or self.transport.is_closing():
            return
        answer = problem(error)
        log.info("a connection was refused", peer=self._peer, status=answer.status_code, code=error.code)
        if not self._may_answer():
            self.transport.abort()
            return
        status = f"HTTP/1.1 {answer.status_code} {http.HTTPStatus(answer.status_code).phrase}\r\n".encode()
        fields = [*self.server_state.default_headers, *answer.raw_headers]
        head = b"".join(b"%s: %s\r\n" % field for field in fields)
        self.transport.write(status + head + b"\r\n" + bytes(answer.body))
        self.transport.write_eof()
        self._is_refused = True
        if self.cycle is not None:  # an app that waits for the rest of a body
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(_LINGER, self.transport.abort)

    def _may_answer(self) -> bool:
        """Whether the peer would take an answer for that to what is wrong, not for another or a part of one."""
        cycle = self.cycle
        if cycle is None:
            return True
        return not cycle.more_body if cycle.response_complete else cycle.more_body and not cycle.response_started

    @property
    def _peer(self) -> str | None:
        return self.client[0] if self.client else None


class HttpToolsConnection(_Guarded, HttpToolsProtocol):
    """With the parser that is fast and bounds nothing."""

    def __init__(self, deadlines: Deadlines, **uvicorn: Any) -> None:
        self._pending = 0  # bytes since the last that were of a body, or ended a head
        super().__init__(deadlines, **uvicorn)

    def data_received(self, data: bytes) -> None:
        """Also of heads, trailers and chunk extensions without end."""
        if self._is_refused:
            return
        self._pending += len(data)
        super().data_received(data)
        if self._pending > MAX_HEAD_BYTES:
            self._refuse(_too_large())

    def on_headers_complete(self) -> None:
        """Look at a head before a request is made of it."""
        if self._pending > MAX_HEAD_BYTES and len(self.url) + _size(self.headers) > MAX_HEAD_BYTES:
            raise _too_large()
        self._pending = 0
        _check_head(self.headers, self.parser.get_http_version)
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A piece of a body."""
        self._pending = 0
        super().on_body(body)

    def _may_answer(self) -> bool:
        return not self.pipeline and super()._may_answer()


class H11Connection(_Guarded, H11Protocol):
    """With the parser in Python."""

    def __init__(self, deadlines: Deadlines, **uvicorn: Any) -> None:
        super().__init__(deadlines, **uvicorn)
        self.conn = _H11(h11.SERVER, MAX_HEAD_BYTES)

    def data_received(self, data: bytes) -> None:
        """What still comes after a refusal is dropped."""
        if not self._is_refused:
            super().data_received(data)


class _H11(h11.Connection):
    """Which bounds what is incomplete, and has yet to look at what came at once."""

    def next_event(self) -> Any:
        event = super().next_event()
        if isinstance(event, h11.Request):
            try:
                fields = list(event.headers)
                if len(event.target) + _size(fields) > MAX_HEAD_BYTES:
                    raise _too_large()
                _check_head(fields, event.http_version.decode)
            except (MalformedRequest, HeaderFieldsTooLarge) as error:
                raise h11.RemoteProtocolError(error.message) from error
        return event

    def send(self, event: Any) -> Any:
        """What leaves is not copied, as `h11.Connection.send` does."""
        pieces = self.send_with_data_passthrough(event)
        return pieces if pieces is None else pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _check_head(fields: Fields, http_version: Callable[[], str]) -> None:
    names = [name for name, _ in fields]
    if len(names) > MAX_HEAD_FIELDS:
        raise HeaderFieldsTooLarge(f"the request has {len(names)} header fields, more than {MAX_HEAD_FIELDS}")
    hosts = names.count(b"host")
    if hosts != 1 and (hosts or http_version() != "1.0"):
        raise MalformedRequest(f"the request has {hosts} Host fields: send one")
    if b"transfer-encoding" in names:
        if b"content-length" in names:
            raise MalformedRequest("the request has Transfer-Encoding and Content-Length: send one of them")
        if dict(fields)[b"transfer-encoding"].lower() != b"chunked":
            raise MalformedRequest("the request has a Transfer-Encoding other than chunked")


def _size(fields: Fields) -> int:
    return sum(len(name) + len(value) + 4 for name, value in fields)


def _too_large() -> HeaderFieldsTooLarge:
    return HeaderFieldsTooLarge(f"the head of the request has more than {MAX_HEAD_BYTES} bytes")


def _reason(found: BaseException | None) -> PrefixServiceError:
    """What a parser's exception is here: ours came through it, or it says why itself."""
    why: BaseException | None = found
    while why is not None:
        if isinstance(why, PrefixServiceError):
            return why
        why = why.__context__
    if isinstance(found, h11.RemoteProtocolError) and found.error_status_hint == 431:
        return _too_large()
    words, _, _ = str(found).partition(": bytearray")  # h11 quotes the line
    return MalformedRequest(f"this is not HTTP/1.1: {words}")
