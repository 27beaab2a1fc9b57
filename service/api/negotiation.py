"""What HTTP callers may say about a representation: Accept, Content-Type, conditions and ranges (RFC 9110)."""

import re
from typing import Final

from starlette.datastructures import Headers

from service.errors import NotAcceptable, RangeNotSatisfiable, UnsupportedMediaType

_RANGE: Final = re.compile(r"bytes=(?:(\d{1,18})-(\d{0,18})|-(\d{1,18}))")


def require_acceptable(headers: Headers, media_type: str) -> None:
    """Refuse a caller who does not accept `media_type`.

    Raises:
        NotAcceptable: names what there is.
    """
    accept = headers.get("accept")
    if accept is None or not accept.strip():
        return
    # The most specific range that matches decides: type/subtype, then type/*, then */*.
    wanted = {media_type: 2, media_type.partition("/")[0] + "/*": 1, "*/*": 0}
    best, quality = -1, 0.0
    for item in accept.split(","):
        name, *parameters = (part.strip() for part in item.lower().split(";"))
        if wanted.get(name, -1) > best:
            best, quality = wanted[name], _quality(parameters)
    if best < 0 or quality == 0:
        raise NotAcceptable(f"the answer is {media_type}, which Accept: {accept!r:.100} leaves out")


def _quality(parameters: list[str]) -> float:
    for parameter in parameters:
        if parameter.startswith("q="):
            try:
                return float(parameter[2:])
            except ValueError:
                return 1.0
    return 1.0


def require_media_type(headers: Headers, *allowed: str) -> str:
    """The media type of a body, without parameters.

    Raises:
        UnsupportedMediaType: it is none of `allowed`, or the body is compressed.
    """
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity":
        raise UnsupportedMediaType(f"bodies are read as they are, not with Content-Encoding: {encoding:.40}")
    found = headers.get("content-type", "").partition(";")[0].strip().lower()
    if found not in allowed:
        raise UnsupportedMediaType(f"the body must be {' or '.join(allowed)}, got {found or 'no Content-Type'!r:.80}")
    return found


def matches(header: str | None, etag: str) -> bool:
    """Whether an If-None-Match or If-Match header names this entity tag, by weak comparison."""
    if header is None:
        return False
    tags = [tag.strip().removeprefix("W/") for tag in header.split(",")]
    return "*" in tags or etag in tags


def requested_range(headers: Headers, etag: str, length: int) -> tuple[int, int] | None:
    """The one byte range `start, stop` that is asked for; None for the whole, also when several are (CVE-2025-62727).

    Raises:
        RangeNotSatisfiable: it lies outside the body of `length` bytes.
    """
    match = _RANGE.fullmatch(headers.get("range", "").replace(" ", ""))
    if match is None or headers.get("if-range", etag) != etag:
        return None
    first, last, suffix = match.groups()
    if suffix is not None:
        start, stop = max(length - int(suffix), 0), length
    else:
        start, stop = int(first), min(int(last) + 1, length) if last else length
        if last and int(last) < start:
            return None  # RFC 9110: such a range is invalid, and an invalid one is ignored
    if start >= length or start >= stop:
        raise RangeNotSatisfiable(f"the body has {length} bytes", length)
    return start, stop
