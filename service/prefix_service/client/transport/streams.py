"""A stream of server-sent events, read over a connection of its own while it arrives."""

import json
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any, Final

from prefix_service.client.protocol import Answer, Request, require_success
from prefix_service.client.transport.connection import connection_failed
from prefix_service.client.transport.http1 import MAX_HEAD
from prefix_service.client.transport.link import Link, carry_out
from prefix_service.client.transport.pool import Interrupt, Pool
from prefix_service.errors import InvalidResponse

MEDIA_TYPE: Final = "text/event-stream"
_MOST_BYTES: Final = 1 << 20
"""The most bytes of one event, and of an answer that is no stream."""

Event = tuple[str, Any]
"""The position from which another stream goes on, and the data from its JSON; None if there is none."""


def events(pool: Pool, request: Request, interrupt: Interrupt, silence: float) -> Iterator[Event]:
    """Sends a GET; yields the events of its answer until that ends.

    Raises:
        ConnectionFailed: nothing arrived for `silence` seconds, the connection broke, or `interrupt` was called.
        PrefixServiceError: the service reported it.
        InvalidResponse: the answer is no stream of events.
    """
    rest = b""
    for piece in _pieces(pool, request, interrupt, silence):
        *blocks, rest = (rest + piece.replace(b"\r\n", b"\n")).split(b"\n\n")
        for block in blocks:
            yield _event(block)
        if len(rest) > _MOST_BYTES:
            raise InvalidResponse(f"an event has more than {_MOST_BYTES} bytes")


def _pieces(pool: Pool, request: Request, interrupt: Interrupt, silence: float) -> Iterator[bytes]:
    """Yields the pieces of a body as they arrive."""
    import h11

    connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD)
    connection.send(h11.Request(method="GET", target="/", headers=[("Host", "service")]))
    connection.send(h11.EndOfMessage())
    answer = Answer(0, {}, bytearray())
    try:
        for data in _received(pool, request, interrupt, silence):
            connection.receive_data(data)
            while (event := connection.next_event()) is not h11.NEED_DATA:
                if isinstance(event, h11.Response):
                    answer = _begun(pool, request, event.status_code, event.headers)
                elif isinstance(event, h11.Data) and answer.status == 200:
                    yield bytes(event.data)
                elif isinstance(event, h11.Data):
                    answer = _longer(answer, event.data)
                elif isinstance(event, h11.EndOfMessage):
                    require_success(answer)
                    return
    except OSError as error:
        raise connection_failed(error, pool.connection.address) from error
    except h11.ProtocolError as error:
        failed = ConnectionError(f"the answer is not sound HTTP/1.1: {error}")
        raise connection_failed(failed, pool.connection.address) from error


def _begun(pool: Pool, request: Request, status: int, fields: Iterable[tuple[bytes, bytes]]) -> Answer:
    """Returns an answer without its body.

    Raises:
        InvalidResponse: it is another catalog's than before, or a success that is no stream of events.
    """
    headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in fields}
    pool.connection.note_answer(request, headers, 0.0)
    found = headers.get("content-type", "")
    if status == 200 and not found.startswith(MEDIA_TYPE):
        raise InvalidResponse(f"the answer should be {MEDIA_TYPE}, got {found or 'nothing'!r:.100}")
    return Answer(status, headers, bytearray())


def _longer(answer: Answer, data: bytes) -> Answer:
    """Returns an answer that is no stream with more of its body.

    Raises:
        InvalidResponse: it is too long.
    """
    if len(answer.body) + len(data) > _MOST_BYTES:
        raise InvalidResponse(f"status {answer.status} with more than {_MOST_BYTES} bytes")
    return replace(answer, body=bytearray(b"".join((answer.body, data))))


def _received(pool: Pool, request: Request, interrupt: Interrupt, silence: float) -> Iterator[bytes]:
    """Yields the bytes of an answer as they arrive, and b"" at the end."""
    link = Link(pool.connection.dial(time.monotonic() + silence))
    with closing(link.socket), interrupt.watching(link.socket):
        message, _ = pool.message(request)
        yield link.received(carry_out(link.begin(message), link.socket, time.monotonic() + silence))
        while True:
            data = carry_out(link.more(), link.socket, time.monotonic() + silence)
            yield data
            if not data:
                return


def _event(block: bytes) -> Event:
    """Returns one event.

    Raises:
        InvalidResponse: its data is not JSON.
    """
    fields = dict[str, str]()
    for line in block.decode(errors="replace").split("\n"):
        name, _, value = line.partition(":")
        fields[name] = value.removeprefix(" ")
    try:
        return fields.get("id", ""), json.loads(fields["data"]) if "data" in fields else None
    except (ValueError, RecursionError) as error:
        raise InvalidResponse(f"the data of an event is not JSON that can be read: {block[:80]!r}") from error
