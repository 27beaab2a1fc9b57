"""uvicorn's protocols for both parsers, changed so that both accept the same requests, those of `framing`.

Each override names the behaviour of uvicorn (0.54), httptools (0.9) or h11 (0.16) that it corrects. A request that is
passed to the app costs one scan of its header names.
"""

import asyncio
import sys
from collections.abc import Awaitable
from functools import partial
from typing import Any, Literal, cast

import h11
import httptools
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from prefix_service.api.server.connections import PIECE, Deadlines, Guarded, Remembered
from prefix_service.api.server.framing import MAX_HEAD_BYTES, admit, check_trailers, size, too_large
from prefix_service.api.server.input_turns import InputTurns
from prefix_service.api.server.peers import Peers
from prefix_service.api.server.strict_h11 import StrictH11
from prefix_service.errors import MalformedRequest, PrefixServiceError
from prefix_service.settings import Settings
from prefix_service.system.file_limit import most_connections

Message = dict[str, Any]
_LARGE_PIECE = 256 << 10
_HEAD_PIECE = 1 << 10
_SMALL_PIECE = 256  # for the tiniest chunks, a millisecond of h11


def protocol_class(
    parser: Literal["httptools", "h11"], deadlines: Deadlines, remembered: Remembered, most: int = sys.maxsize
) -> type[asyncio.Protocol]:
    """Returns a factory of connections for uvicorn's `http`, which it only calls.

    At most `most` per process are open. `remembered` is called after the app has been opened.
    """
    peers: Peers[Guarded] = Peers(most)
    connection = HttpToolsConnection if parser == "httptools" else H11Connection
    made = partial(connection, deadlines, peers, InputTurns(), remembered)
    return cast("type[asyncio.Protocol]", made)


def connection_class(settings: Settings, remembered: Remembered) -> type[asyncio.Protocol]:
    """Returns the factory of connections for a service with these settings."""
    deadlines = Deadlines(settings.receive_timeout, settings.send_timeout)
    return protocol_class(settings.parser, deadlines, remembered, most_connections(settings.max_connections))


class HttpToolsConnection(Guarded, HttpToolsProtocol):
    """A connection that httptools parses, which is fast and bounds nothing."""

    def __init__(
        self, deadlines: Deadlines, peers: Peers[Guarded], turns: InputTurns, remembered: Remembered, **uvicorn: Any
    ) -> None:
        self._pending = 0  # bytes since the last of a body, or since the end of a head
        self._has_body_to_come = False
        self._body_left = 0  # bytes, of a body with a length
        self._is_last = False  # the newest request is complete, and the connection ends after its answer
        super().__init__(deadlines, peers, turns, remembered, **uvicorn)
        self.app = partial(_without_chunks_or_continued, self.app)

    def connection_lost(self, exc: Exception | None) -> None:
        """Drops the queued requests, too, which refer back to this connection and are never begun."""
        super().connection_lost(exc)
        self.pipeline.clear()

    def _parse(self, data: bytes | memoryview) -> None:
        """Parses a piece. uvicorn's method loses the position at which a request with `Upgrade` ends in `data`."""
        self._unset_keepalive_if_required()
        self._pending += len(data)
        try:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                self._read_again(memoryview(data)[upgrade.args[0] :])
        except httptools.HttpParserError as error:
            if not self._is_last:
                self._refuse(_reason(error))
        else:
            if self._pending > MAX_HEAD_BYTES:  # also catches heads, trailers and chunk extensions without an end
                self._refuse(too_large())

    def _read_again(self, rest: memoryview) -> None:
        """Parses the newest head again, without `Upgrade`, and then the bytes behind it.

        llhttp takes everything behind such a head for another protocol, and httptools cannot tell it that the server
        declined. It would take the request's body for the next request.
        """
        while True:
            head = self._declined_head()
            self.parser = httptools.HttpRequestParser(self)
            self.parser.feed_data(head)
            try:
                self.parser.feed_data(rest)
            except httptools.HttpParserUpgrade as upgrade:
                rest = rest[upgrade.args[0] :]
            else:
                return

    def _declined_head(self) -> bytes:
        """Returns the head that was just parsed, without `Upgrade`, which `admit` removed."""
        version = self.parser.get_http_version().encode()
        lines = [b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, version)]
        lines += [b"%s: %s" % field for field in self.headers]
        return b"\r\n".join([*lines, b"", b""])

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keeps a field as uvicorn does, but without the blanks behind its value, which llhttp keeps."""
        name = name.lower()
        if name == b"expect":
            self.expect_100_continue = True
        self.headers.append((name, value.rstrip(b" \t")))

    def on_headers_complete(self) -> None:
        """Checks a head before a request is made of it; uvicorn parses the target, and does not check the fields."""
        if self._is_last:  # uvicorn would queue a request that is never answered
            raise MalformedRequest("a request follows one that asked to close the connection")
        if self._pending > MAX_HEAD_BYTES and len(self.url) + size(self.headers) > MAX_HEAD_BYTES:
            raise too_large()
        self.url = admit(self.parser.get_method(), self.url, version := self.parser.get_http_version(), self.headers)
        if self.parser.should_upgrade():
            return  # see `_read_again`
        self._pending, self._has_body_to_come = 0, True
        self._body_left = next((int(value) for name, value in self.headers if name == b"content-length"), 0)
        if version == "1.0":
            self.expect_100_continue = False  # RFC 9110, section 10.1.1
        super().on_headers_complete()
        self.headers = []  # for trailers; the request keeps the old list

    def on_body(self, body: bytes) -> None:
        """Passes on a piece of a body."""
        self._pending = 0
        self._body_left -= len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Ends a request; uvicorn would end the previous one if this one has `Upgrade`."""
        if self.parser.should_upgrade():
            return  # see `_read_again`
        if self.headers:
            check_trailers(self.headers)
        self._pending, self._has_body_to_come = 0, False
        cycle = self.cycle
        self._is_last = not cycle.keep_alive
        cycle.more_body = False
        cycle.message_event.set()

    @property
    def _piece(self) -> int:
        """The size of the next piece: a body with a length is one event per piece,
        and its last piece has no request behind it.
        """
        return max(PIECE, self._body_left)

    @property
    def _ignores_input(self) -> bool:
        return self._is_last or super()._ignores_input

    @property
    def _is_in_body(self) -> bool:
        return self._has_body_to_come

    def _owes_answers(self) -> bool:
        return bool(self.pipeline) or super()._owes_answers()

    def _has_next(self) -> bool:
        return bool(self.pipeline)


class H11Connection(Guarded, H11Protocol):
    """A connection that h11, in Python, parses."""

    conn: StrictH11

    def __init__(
        self, deadlines: Deadlines, peers: Peers[Guarded], turns: InputTurns, remembered: Remembered, **uvicorn: Any
    ) -> None:
        super().__init__(deadlines, peers, turns, remembered, **uvicorn)
        self.conn = StrictH11()
        self.app = partial(_continued, self.app)

    def _parse(self, data: bytes | memoryview) -> None:
        self._unset_keepalive_if_required()
        self.conn.receive_data(bytes(data))
        self.handle_events()

    @property
    def _piece(self) -> int:
        """The size of the next piece.

        A body with a length is one event per piece, and so is the rest of a chunk. Many small chunks in a large piece
        would keep h11 busy for long, also behind a head.
        """
        if not self.conn.is_in_body:
            return _HEAD_PIECE
        return _LARGE_PIECE if self.conn.has_length else min(_LARGE_PIECE, max(_SMALL_PIECE, self.conn.left_in_chunk))

    @property
    def _ignores_input(self) -> bool:
        """Whether input is dropped; h11 would refuse data behind a request that asked for the end of the connection."""
        return self.conn.their_state in (h11.MUST_CLOSE, h11.CLOSED) or super()._ignores_input

    def _has_next(self) -> bool:
        return bool(self.conn.trailing_data[0])

    def send_400_response(self, _message: str) -> None:
        """Refuses a request. uvicorn calls this while it handles the parser's
        exception, and would answer in plain text.
        """
        self._refuse(_reason(sys.exc_info()[1]))

    @property
    def _is_in_body(self) -> bool:
        return self.conn.is_in_body


def _without_chunks_or_continued(app: Any, scope: Any, receive: Any, send: Any) -> Awaitable[None]:
    """Calls the app with httptools' corrections of `send`, uvicorn's bound method of the request.

    A correction that the request itself kept would be a cycle, which only a collection of garbage frees.
    """
    if scope["http_version"] == "1.0":
        send = partial(_send_without_chunks, send.__self__)
        return cast("Awaitable[None]", app(scope, receive, send))
    return _continued(app, scope, receive, send)


def _continued(app: Any, scope: Any, receive: Any, send: Any) -> Awaitable[None]:
    """Calls the app with `_send_once_continued` for a request that waits for `100 Continue`."""
    if send.__self__.waiting_for_100_continue:
        send = partial(_send_once_continued, send.__self__)
    return cast("Awaitable[None]", app(scope, receive, send))


async def _send_once_continued(cycle: Any, message: Message) -> None:
    """Closes the connection after an answer that is sent before `100 Continue` and before the body.

    The client may then send the body or omit it (RFC 9110, section 10.1.1), so the service cannot know where the next
    request begins.
    """
    is_body_optional = cycle.waiting_for_100_continue and cycle.more_body and not cycle.body
    if message["type"] == "http.response.start" and is_body_optional:
        message = {**message, "headers": [*message.get("headers", ()), (b"connection", b"close")]}
    await cycle.send(message)


async def _send_without_chunks(cycle: Any, message: Message) -> None:
    """Answers HTTP/1.0 without chunks: closing the connection ends a body without a length.

    uvicorn sends chunks, unless its cycle knows the length.
    """
    if message["type"] == "http.response.start":
        cycle.chunked_encoding = False
    else:
        cycle.expected_content_length = len(message.get("body", b""))
    await cycle.send(message)


def _reason(found: BaseException | None) -> PrefixServiceError:
    """Returns a parser's exception as an error of this project: the one
    that it was raised for, or one with its text.
    """
    why: BaseException | None = found
    while why is not None:
        if isinstance(why, PrefixServiceError):
            return why
        why = why.__context__
    if isinstance(found, h11.RemoteProtocolError) and found.error_status_hint == 431:
        return too_large()
    words, _, _ = str(found).partition(": bytearray")  # h11 quotes the line
    return MalformedRequest(f"this is not HTTP/1.1: {words}")
