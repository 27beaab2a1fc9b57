"""h11, made as strict about lines and chunks as llhttp, which `httptools` uses.

h11 accepts several spellings that another parser in front of the service may read differently. This module replaces its
receive buffer, from which h11 (0.16) takes whole lines, and checks each parsed head by the rules of `framing`.
"""

import re
from typing import Any, Final

import h11
from h11._receivebuffer import ReceiveBuffer

from prefix_service.api.server.framing import MAX_HEAD_BYTES, Fields, admit, check_trailers, size, too_large
from prefix_service.errors import HeaderFieldsTooLarge, MalformedRequest

_BAD_BYTES: Final = re.compile(
    rb"(?<!\r)\n"  # a bare line feed
    rb"|\r[^\n]"  # a bare carriage return
    rb"|\r\n[ \t]"  # a folded line
    rb"|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]"
)
_SPACES: Final = re.compile(rb" +")
_KIN: Final = re.compile(rb"\A(?:((?:GET|POST|OPTIONS) [^ ]+ )RTSP|(SOURCE [^ ]+ )ICE)(?=/)")
_LENGTHS: Final = re.compile(rb"\r\ncontent-length:([^\r]*)", re.IGNORECASE)
_PROXY_CONNECTION: Final = re.compile(rb"\r\nproxy-connection:", re.IGNORECASE)
_QUOTED: Final = rb'"(?:[\t\x20\x21\x23-\x5b\x5d-\x7e\x80-\xff]|\\[\t\x20-\x7e\x80-\xff])*"'
_TOKEN: Final = rb"[-!#$%&'*+.^_`|~0-9A-Za-z]*"
_CHUNK: Final = re.compile(
    rb"0*([0-9A-Fa-f]{1,16})"
    rb"(?:;(?!\r)" + _TOKEN + rb"(?:=" + _TOKEN + rb"(?:" + _QUOTED + rb")?)?)*\r\n"
)  # fmt: skip


class StrictH11(h11.Connection):
    """The server's side of a connection; refuses what `framing` refuses, with h11's own RemoteProtocolError."""

    def __init__(self) -> None:
        super().__init__(h11.SERVER, MAX_HEAD_BYTES)
        self._receive_buffer = self._lines = _StrictBuffer()
        self.is_in_body = self.has_length = False
        """Whether the newest request has more to come, and whether its head has a Content-Length."""

    @property
    def left_in_chunk(self) -> int:
        """Bytes of a chunked body's newest chunk that are still to come, if h11 has read its size."""
        left: int = getattr(self._reader, "_bytes_in_chunk", 0)
        return left

    def next_event(self) -> Any:
        """Parses the next event; a request's target is in origin-form.

        h11 bounds incomplete heads only, refuses empty lines in front of a request, and leaves the other rules of
        `framing` to its user.

        Raises:
            h11.RemoteProtocolError: the request is refused.
        """
        if self.their_state is h11.IDLE:
            self._lines.skip_empty_lines()
        event = super().next_event()
        try:
            if isinstance(event, h11.Request):
                event, self.is_in_body = _admitted(event), True
                self.has_length = any(name == b"content-length" for name, _ in event.headers)
            elif isinstance(event, h11.EndOfMessage):
                check_trailers(event.headers)
                self.is_in_body = False
        except (MalformedRequest, HeaderFieldsTooLarge) as error:
            raise h11.RemoteProtocolError(error.message) from error
        return event

    def send(self, event: Any) -> Any:
        """Serializes an event without the copy that `h11.Connection.send` makes."""
        pieces = self.send_with_data_passthrough(event)
        return pieces if pieces is None else pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _admitted(event: h11.Request) -> h11.Request:
    fields: Fields = list(event.headers)
    if len(event.target) + size(fields) > MAX_HEAD_BYTES:
        raise too_large()
    count = len(fields)
    target = admit(event.method, event.target, event.http_version.decode(), fields)
    if target == event.target and len(fields) == count:
        return event
    return h11.Request(method=event.method, target=target, headers=fields, http_version=event.http_version)


class _StrictBuffer(ReceiveBuffer):
    """A buffer whose lines end in CRLF and are not folded, with one numeric length, and chunk sizes without blanks.

    Like llhttp, which reports none of them, it accepts several spaces between the parts of a request line, reads
    `Proxy-Connection` as `Connection`, and reads RTSP and ICE as HTTP for the methods that they share.
    """

    def skip_empty_lines(self) -> None:
        """Drops the line ends in front of a request (RFC 9112, section 2.2)."""
        if self._data.startswith((b"\r", b"\n")):
            self._extract(len(self._data) - len(self._data.lstrip(b"\r\n")))

    def maybe_extract_lines(self) -> list[bytearray] | None:
        """Extracts a head or trailers: all lines up to the first empty one; None if it has not arrived yet."""
        if self._data[:2] == b"\r\n":  # no trailers
            self._extract(2)
            return []
        start = max(0, self._multiple_lines_search - 3)
        end = self._data.find(b"\r\n\r\n", start)
        stop = len(self._data) if end < 0 else end
        if bad := _BAD_BYTES.search(self._data, max(0, start - 1), stop):
            raise h11.LocalProtocolError(f"a line has {bytes(bad[0])!r}")
        if end < 0:
            self._multiple_lines_search = stop
            return None
        head = _PROXY_CONNECTION.sub(b"\r\nconnection:", self._extract(end + 4)[:-4])
        lengths = _LENGTHS.findall(head)
        if len(lengths) > 1 or not all(length.strip(b" \t").isdigit() for length in lengths):
            raise h11.LocalProtocolError("the request has two Content-Length, or one that is no number")
        request_line, *lines = head.split(b"\r\n")
        request_line = _KIN.sub(rb"\1\2HTTP", _SPACES.sub(b" ", request_line))
        return [bytearray(request_line), *map(bytearray, lines)]

    def maybe_extract_next_line(self) -> bytearray | None:
        """Extracts a chunk's size line, without extensions and leading zeros; None if it has not arrived yet."""
        line = super().maybe_extract_next_line()
        if line is None:
            return None
        chunk = _CHUNK.fullmatch(line)
        if chunk is None:
            raise h11.LocalProtocolError(f"a chunk begins with {bytes(line[:40])!r}")
        return bytearray(chunk[1] + b"\r\n")
