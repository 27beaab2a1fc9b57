"""Content negotiation, conditions and ranges of HTTP requests (RFC 9110), and wanted digests (RFC 9530)."""

import re
from typing import Final

from starlette.datastructures import Headers
from starlette.requests import Request

from prefix_service.errors import HeaderFieldsTooLarge, NotAcceptable, RangeNotSatisfiable, UnsupportedMediaType
from prefix_service.prefix.wire.digests import Algorithm, wanted_algorithm

_RANGE: Final = re.compile(r"bytes=(?:([0-9]{1,40})-([0-9]{0,40})|-([0-9]{1,40}))", re.IGNORECASE)


_MOST_FIELD: Final = 8192  # bytes of a list in a header field


def require_acceptable(headers: Headers, media_type: str) -> None:
    """Checks that the caller accepts `media_type`.

    Raises:
        NotAcceptable: `Accept` excludes it; the message names the media type.
        HeaderFieldsTooLarge: the field is too long.
    """
    accept = _joined(headers, "accept")
    if not accept:
        return
    # The most specific range that matches decides: type/subtype, then type/*, then */*.
    wanted = {media_type: 2, media_type.partition("/")[0] + "/*": 1, "*/*": 0}
    best, quality = -1, 0.0
    for item in accept.split(","):
        name, *parameters = (part.strip() for part in item.split(";"))
        if wanted.get(name, -1) > best:
            best, quality = wanted[name], _quality(parameters)
    if best < 0 or quality == 0:
        raise NotAcceptable(f"the answer is {media_type}, which Accept: {accept!r:.100} leaves out")


def lists(headers: Headers, media_type: str) -> bool:
    """Returns whether the caller names `media_type` itself in `Accept`, not by a wildcard."""
    for item in _joined(headers, "accept").split(","):
        name, *parameters = (part.strip() for part in item.split(";"))
        if name == media_type and _quality(parameters) > 0:
            return True
    return False


def takes_gzip(headers: Headers) -> bool:
    """Whether a caller names gzip among the encodings that it takes."""
    for item in _joined(headers, "accept-encoding").split(","):
        name, *parameters = (part.strip() for part in item.split(";"))
        if name == "gzip" and _quality(parameters) > 0:
            return True
    return False


async def require_json_acceptable(request: Request) -> None:
    """Checks that the caller accepts JSON, for routes that answer with it; a deletion answers with nothing.

    Raises:
        NotAcceptable: `Accept` excludes JSON.
    """
    if request.method != "DELETE":
        require_acceptable(request.headers, "application/json")


def _quality(parameters: list[str]) -> float:
    for parameter in parameters:
        if parameter.startswith("q="):
            try:
                return float(parameter[2:])
            except ValueError:
                return 1.0
    return 1.0


def require_media_type(headers: Headers, *allowed: str) -> str:
    """Returns the media type of a body, without parameters.

    Raises:
        UnsupportedMediaType: it is not one of `allowed`, or the body is compressed.
    """
    encoding = _joined(headers, "content-encoding") or "identity"
    if encoding != "identity":
        raise UnsupportedMediaType(f"compressed bodies are not supported: send no Content-Encoding, got {encoding:.40}")
    found = _joined(headers, "content-type").partition(";")[0].strip()
    if found not in allowed or len(headers.getlist("content-type")) > 1:
        raise UnsupportedMediaType(f"the body must be {' or '.join(allowed)}, got {found or 'no Content-Type'!r:.80}")
    return found


def _joined(headers: Headers, name: str) -> str:
    return _listed(headers, name).strip().lower()


def _listed(headers: Headers, name: str) -> str:
    """Returns the list in a header field, which may have several lines.

    Raises:
        HeaderFieldsTooLarge: the list is too long.
    """
    value = ", ".join(headers.getlist(name))
    if len(value) > _MOST_FIELD:
        raise HeaderFieldsTooLarge(f"{name} has {len(value)} bytes, more than {_MOST_FIELD}")
    return value


def is_current(headers: Headers, etag: str) -> bool:
    """Returns whether `If-None-Match` names this entity tag, by weak comparison."""
    named = [value for name, value in headers.raw if name == b"if-none-match"]  # `getlist` costs twice as much
    if not named or named == [etag.encode()]:
        return bool(named)
    tags = [tag.strip().removeprefix("W/") for tag in _listed(headers, "if-none-match").split(",")]
    return "*" in tags or etag in tags


def is_expected(headers: Headers, etag: str) -> bool:
    """Returns whether `If-Match` names this entity tag, by strong comparison."""
    tags = [tag.strip() for tag in _listed(headers, "if-match").split(",")]
    return "*" in tags or etag in tags


def wanted_digest(headers: Headers) -> Algorithm | None:
    """Returns the algorithm that `Want-Repr-Digest` (RFC 9530) asks for, or None."""
    wanted = _listed(headers, "want-repr-digest")
    return wanted_algorithm(wanted) if wanted else None


def requested_range(headers: Headers, etag: str, length: int) -> tuple[int, int] | None:
    """Returns the requested byte range as `start, stop`; None for the whole body.

    A request for several ranges gets the whole body, too (CVE-2025-62727).

    Raises:
        RangeNotSatisfiable: the range is outside the body of `length` bytes.
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
