"""multipart/form-data (RFC 7578; RFC 2046, section 5.1), read piece by piece.

This is own code because no library that was tried reads all that RFC 2046 allows: python-multipart refuses a preamble
and folded fields, multipart refuses blanks behind a boundary, and Werkzeug adds a byte to a part whose piece ends
within a boundary.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

from prefix_service.errors import InvalidRequest

_MAX_PART_HEAD: Final = 16 << 10
_MAX_PADDING: Final = 1 << 10  # blanks behind a boundary
_FOLD: Final = re.compile(rb"\r\n[ \t]+")
_FIELD: Final = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+)[ \t]*:([^\r\n\0]*)")
_MAX_VALUE: Final = 4 << 10
_PARAMETER: Final = re.compile(
    r";[ \t]*+(?:([!#$%&'*+\-.^_`|~0-9A-Za-z]++)[ \t]*+=[ \t]*+"
    r'(?:"((?:[^"\\]|\\.)*+)"|([^ \t";]*+))[ \t]*+)?+'
)
"""A parameter, or nothing, behind a semicolon. No quantifier gives back what it took, so a match takes linear time."""
_ESCAPE: Final = re.compile(r"\\(.)")


@dataclass(frozen=True, slots=True)
class Part:
    """A part begins: the `name` of its Content-Disposition, "" if that has none."""

    name: str


class _State(Enum):
    PREAMBLE = auto()
    HEAD = auto()
    CONTENT = auto()
    EPILOGUE = auto()


class MultipartReader:
    """Reads one body. Only CRLF ends a line; preamble and epilogue are ignored."""

    def __init__(self, content_type: str) -> None:
        """Raises InvalidRequest if the Content-Type has no boundary."""
        boundary = _parameter(content_type, "boundary")
        if not boundary or not boundary.isascii():
            raise InvalidRequest("the multipart body needs a boundary of ASCII characters in its Content-Type")
        self._delimiter = b"\r\n--" + boundary.encode()
        escaped = re.escape(self._delimiter)
        self._line = re.compile(escaped + rb"(?:(--)|[ \t]*\r\n)")
        self._unfinished = re.compile(escaped + rb"(?:-|[ \t]*\r?)\Z")
        self._buffer = bytearray(b"\r\n")  # in front of a boundary that is the first line
        self._state = _State.PREAMBLE

    @property
    def is_complete(self) -> bool:
        """Whether the closing boundary was read."""
        return self._state is _State.EPILOGUE

    def read(self, data: bytes) -> Iterator[Part | bytes]:
        """Yields the parts that begin in `data`, each followed by pieces of its content.

        Raises:
            InvalidRequest: the head of a part is malformed or too long.
        """
        self._buffer += data
        while self._state is not _State.EPILOGUE:
            if self._state is _State.HEAD:
                head = self._next_head()
                if head is None:
                    return
                self._state = _State.CONTENT
                yield Part(_name(head))
                continue
            start = self._buffer.find(self._delimiter)  # much faster than the expression
            boundary = None if start < 0 else self._line.search(self._buffer, start)
            content = self._take(self._unambiguous() if boundary is None else boundary.start())
            if content and self._state is _State.CONTENT:
                yield content
            if boundary is None:
                return
            self._state = _State.HEAD if boundary[1] is None else _State.EPILOGUE
            self._take(boundary.end() - boundary.start() - 2)  # a part's head begins with the CRLF of its boundary
        self._buffer.clear()

    def _next_head(self) -> bytes | None:
        end = self._buffer.find(b"\r\n\r\n", 0, _MAX_PART_HEAD)
        if end >= 0:
            return self._take(end + 4)[2:-4]
        if len(self._buffer) >= _MAX_PART_HEAD:
            raise InvalidRequest(f"the head of a part has more than {_MAX_PART_HEAD} bytes")
        return None

    def _unambiguous(self) -> int:
        """Returns how many bytes at the start of the buffer belong to no boundary, whatever comes next."""
        size = len(self._buffer)
        if found := self._unfinished.search(self._buffer, max(0, size - len(self._delimiter) - _MAX_PADDING)):
            return found.start()
        start = self._buffer.rfind(b"\r", max(0, size - len(self._delimiter)))
        return start if start >= 0 and self._delimiter.startswith(self._buffer[start:]) else size

    def _take(self, count: int) -> bytes:
        with memoryview(self._buffer) as view:
            taken = bytes(view[:count])
        del self._buffer[:count]
        return taken


def _name(head: bytes) -> str:
    """Returns the name of a part, by its head without the empty line."""
    found = []
    for line in _FOLD.sub(b" ", head).split(b"\r\n") if head else ():
        field = _FIELD.fullmatch(line)
        if field is None:
            raise InvalidRequest(f"a part has a line that is no header field: {line[:80].decode('latin-1')!r}")
        if field[1].lower() == b"content-disposition":
            found.append(field[2].strip().decode("utf-8", "replace"))
    if len(found) != 1:
        raise InvalidRequest(f"a part has {len(found)} Content-Disposition: send one")
    return _parameter(found[0], "name")


def _parameter(value: str, name: str) -> str:
    """Returns a parameter of a header field's value, "" where it is missing.

    Values are tokens or quoted strings (RFC 9110, section 5.6.6). Unquoted values may also contain `=`, `/`, `:` and
    characters beyond ASCII, which common clients leave unquoted. The continuations and character sets of RFC 2231 have
    no meaning in forms (RFC 7578, section 4.2): `name*` is another parameter than `name`.

    Raises:
        InvalidRequest: the value is longer than `_MAX_VALUE` characters, is malformed, or has a parameter twice.
    """
    if len(value) > _MAX_VALUE:
        raise InvalidRequest(f"the field {value[:40]!r}... has {len(value)} characters, more than {_MAX_VALUE}")
    found: dict[str, str] = {}
    at = value.find(";")
    while 0 <= at < len(value):
        parameter = _PARAMETER.match(value, at)
        if parameter is None:
            raise InvalidRequest(
                f'no parameter can be read at {value[at : at + 40]!r}: send name=value, or name="value"'
            )
        at = parameter.end()
        key, quoted, token = parameter.groups()
        if key is None:
            continue
        if key.lower() in found:
            raise InvalidRequest(f"the parameter {key!r:.40} is given twice: send it once")
        found[key.lower()] = token if quoted is None else _ESCAPE.sub(r"\1", quoted)
    return found.get(name, "")
