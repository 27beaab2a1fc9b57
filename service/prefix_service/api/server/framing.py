"""Framing: which requests the service accepts, and where each ends, with either parser.

The parsers check the syntax of lines and chunks. This module checks the fields of a head, which both parsers pass on in
the same form. `tests/api/framing/README.md` is the table of accepted and refused requests.
"""

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Final

from prefix_service.errors import HeaderFieldsTooLarge, MalformedRequest

MAX_HEAD_BYTES: Final = 64 << 10
MAX_HEAD_FIELDS: Final = 100

_METHODS: Final = frozenset(
    b"ACL BIND CHECKOUT COPY DELETE GET HEAD LINK LOCK M-SEARCH MERGE MKACTIVITY MKCALENDAR MKCOL MOVE NOTIFY OPTIONS "
    b"PATCH POST PROPFIND PROPPATCH PURGE PUT QUERY REBIND REPORT SEARCH SOURCE SUBSCRIBE TRACE UNBIND UNLINK UNLOCK "
    b"UNSUBSCRIBE".split()
)
"""The HTTP methods that llhttp knows; the app answers most with 405. CONNECT is left out, because it opens a tunnel."""

_AUTHORITY: Final = rb"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9\-._~%!$&'()*+,;=]*)(?::[0-9]*)?"
_HOST: Final = re.compile(_AUTHORITY)
_ABSOLUTE_FORM: Final = re.compile(
    rb"(?i:https?)://(?=[^/?:])(" + _AUTHORITY + rb")(/[\x21\x22\x24-\x3e\x40-\x7e]*)?(\?[\x21\x22\x24-\x7e]*)?"
)
_RARE: Final = frozenset({b"content-length", b"transfer-encoding", b"expect", b"upgrade"})
_NOT_IN_TRAILERS: Final = frozenset(
    {b"connection", b"content-length", b"host", b"proxy-connection", b"transfer-encoding", b"upgrade"}
)

Fields = list[tuple[bytes, bytes]]


def admit(method: bytes, target: bytes, version: str, fields: Fields) -> bytes:
    """Checks the head of a request; returns the target in origin-form, `/path?query`. Names in `fields` are lower-case.

    `fields` are changed in place: `Upgrade` is removed, since a server may ignore it (RFC 9110, section 7.8) and this
    one speaks no other protocol; the authority of an absolute target replaces `Host` (RFC 9112, section 3.2.2).

    Raises:
        HeaderFieldsTooLarge: there are more than `MAX_HEAD_FIELDS` fields.
        MalformedRequest: the head is not HTTP/1.0 or 1.1, or is ambiguous about the target, the end or the caller.
    """
    names = [name for name, _ in fields]
    if len(names) > MAX_HEAD_FIELDS:
        raise HeaderFieldsTooLarge(f"the request has {len(names)} header fields, more than {MAX_HEAD_FIELDS}")
    if version not in ("1.1", "1.0"):
        raise MalformedRequest(f"this is HTTP/{version}: send HTTP/1.1 or HTTP/1.0")
    if method not in _METHODS:
        name = method.decode("latin-1")
        raise MalformedRequest(f"the method {name!r:.40} is not known here: send GET, HEAD, POST, PUT or DELETE")
    _check_host(names, version, fields)
    if names.count(b"authorization") > 1:
        raise MalformedRequest("the request has two Authorization fields: send one")
    if not _RARE.isdisjoint(names):
        _check_length(names, version, fields)
        if any(name == b"expect" and value.lower() != b"100-continue" for name, value in fields):
            raise MalformedRequest("the request has an Expect field other than 100-continue: leave it out")
        fields[:] = [field for field in fields if field[0] != b"upgrade"]
    is_origin_form = target.startswith(b"/") and b"#" not in target  # the parsers accept visible ASCII alone
    return target if is_origin_form else _origin_form(target, fields)


def check_trailers(fields: Iterable[tuple[bytes, bytes]]) -> None:
    """Raises MalformedRequest if a trailer could contradict the head about the request's end or route (RFC 9110,
    section 6.5.1); ignores other trailers.
    """
    for name, _ in fields:
        if name in _NOT_IN_TRAILERS:
            raise MalformedRequest(f"the request has {name.decode()} behind its body: send it in the head")


def size(fields: Iterable[tuple[bytes, bytes]]) -> int:
    """Returns the bytes that header fields take in a head."""
    return sum(len(name) + len(value) + 4 for name, value in fields)


def too_large() -> HeaderFieldsTooLarge:
    """Returns the error for a head, trailers or a chunk extension of more than `MAX_HEAD_BYTES` bytes."""
    return HeaderFieldsTooLarge(f"the head of the request has more than {MAX_HEAD_BYTES} bytes")


def _check_host(names: Sequence[bytes], version: str, fields: Fields) -> None:
    hosts = names.count(b"host")
    if hosts != 1:
        if hosts or version == "1.1":
            raise MalformedRequest(f"the request has {hosts} Host fields: send one")
        return
    host = fields[names.index(b"host")][1]
    if not _is_host(host):
        text = host.decode("latin-1")
        raise MalformedRequest(f"the Host {text!r:.100} is not a name or address with or without port")


@lru_cache(maxsize=64)
def _is_host(value: bytes) -> bool:
    return _HOST.fullmatch(value) is not None


def _check_length(names: Sequence[bytes], version: str, fields: Fields) -> None:
    encodings, lengths = names.count(b"transfer-encoding"), names.count(b"content-length")
    if encodings and lengths:
        raise MalformedRequest("the request has Transfer-Encoding and Content-Length: send one of them")
    if encodings + lengths > 1:
        raise MalformedRequest("the request has two fields that say where its body ends: send one")
    if lengths:
        length = fields[names.index(b"content-length")][1]
        if len(length) > 19:
            raise MalformedRequest(f"the Content-Length has {len(length)} digits, more than 19")
    elif encodings and fields[names.index(b"transfer-encoding")][1].lower() != b"chunked":
        raise MalformedRequest("the request has a Transfer-Encoding other than chunked")
    elif encodings and version == "1.0":  # RFC 9112, section 6.1
        raise MalformedRequest("the request is HTTP/1.0, which has no Transfer-Encoding: send a Content-Length")


def _origin_form(target: bytes, fields: Fields) -> bytes:
    absolute = _ABSOLUTE_FORM.fullmatch(target)
    if absolute is None:
        text = target.decode("latin-1")
        raise MalformedRequest(f"the target {text!r:.100} is neither a path nor an http or https URL without fragment")
    authority, path, query = absolute.groups()
    fields[:] = [(b"host", authority), *(field for field in fields if field[0] != b"host")]
    return (path or b"/") + (query or b"")
