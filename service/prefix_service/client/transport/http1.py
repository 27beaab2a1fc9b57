"""Parses the heads of HTTP/1.1 answers (RFC 9112): plain ones here, all others with h11."""

import re
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

MAX_HEAD: Final = 64 << 10
"""The most bytes of an answer's head."""

_MOST_INTERIM: Final = 16  # answers 1xx before the final one

_TOKEN: Final = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_PLAIN: Final = re.compile(rb"HTTP/1\.1 ([2-5][0-9]{2})[^\r\n\0]*\r\n((?:" + _TOKEN + rb":[^\r\n\0]*\r\n)*)\r\n")
_LENGTH: Final = re.compile(r"[0-9]{1,18}")
_BODILESS: Final = (204, 304)


@dataclass(frozen=True, slots=True)
class Head:
    """The head of an answer: its status, its headers (lower-case names,
    repeated ones joined), and its body's length.
    """

    status: int
    headers: Mapping[str, str]
    length: int
    keeps_alive: bool


def read_plain(head: bytes) -> Head | None:
    """Returns the head of an answer whose length follows from its head alone.

    Returns None if h11 must decide: for 1xx, chunks, two lengths, no length, or a malformed head.
    """
    match = _PLAIN.fullmatch(head)
    if match is None:
        return None
    headers = _joined(line.partition(b":")[::2] for line in match[2].split(b"\r\n")[:-1])
    status, keeps_alive = int(match[1]), headers.get("connection", "keep-alive").lower() == "keep-alive"
    if status in _BODILESS:
        return Head(status, headers, 0, keeps_alive)
    length = declared_length(headers)
    if "transfer-encoding" in headers or length is None:
        return None
    return Head(status, headers, length, keeps_alive)


def declared_length(headers: Mapping[str, str]) -> int | None:
    """Returns the length that headers declare; None if it is missing or malformed."""
    length = headers.get("content-length", "")
    return int(length) if _LENGTH.fullmatch(length) else None


def read_carefully(begun: bytes, most: int) -> Generator[None, bytes, tuple[Head, bytearray]]:
    """Parses an answer in any form that h11 accepts. `begun` are its first bytes; send the others in, b"" at the end.

    Raises:
        ConnectionError: the answer is malformed, ends too early, or has a body of more than `most` bytes.
    """
    import h11  # rarely needed

    connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD - 1)
    connection.send(h11.Request(method="GET", target="/", headers=[("Host", "service")]))
    connection.send(h11.EndOfMessage())
    status, headers, body, interim = 0, dict[str, str](), bytearray(), 0
    try:
        connection.receive_data(begun)
        while not isinstance(event := connection.next_event(), h11.EndOfMessage):
            if event is h11.NEED_DATA:
                connection.receive_data((yield))
            elif isinstance(event, h11.Response):
                status, headers = event.status_code, _joined(event.headers)
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.InformationalResponse):
                interim += 1
            if len(body) > most:
                raise ConnectionError(f"the answer has more than {most} bytes")
            if interim > _MOST_INTERIM:
                raise ConnectionError(f"more than {_MOST_INTERIM} interim answers (1xx) came before the answer")
    except h11.ProtocolError as error:
        raise ConnectionError(f"the answer is not sound HTTP/1.1: {error}") from error
    keeps_alive = connection.their_state is h11.DONE and not connection.trailing_data[0]
    return Head(status, headers, len(body), keeps_alive), body


def _joined(pairs: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    headers: dict[str, str] = {}
    for raw_name, raw_value in pairs:
        name, value = raw_name.decode("latin-1").lower(), raw_value.strip(b" \t").decode("latin-1")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return headers
