"""For any answer of a server, a method raises only errors of `errors`, in time and in bounded memory."""

import contextlib
import gzip
import io
import json
import re
import resource
import socket
import time
from typing import Any, Final

import pytest

from prefix_service.client import PrefixClient
from prefix_service.errors import ConnectionFailed, NotFound, PrefixServiceError, TooLarge
from tests.client.hostile import BODY, answer, hostile_server, read_request, repr_digest, says
from tests.client.transport.test_deadlines import CALLS, JSON, KINDS, Call, called
from tests.conftest import free_port

PROBLEM: Final = "Content-Type: application/problem+json"
DEEP: Final = b"[" * 100_000
TENSORS: Final = "Content-Type: application/vnd.safetensors"


def with_metadata(metadata: Any) -> bytes:
    """Returns a prefix whose metadata are replaced."""
    length = int.from_bytes(BODY[:8], "little")
    header = json.loads(BODY[8 : 8 + length])
    header["__metadata__"]["prefix"] = metadata if isinstance(metadata, str) else json.dumps(metadata)
    told = json.dumps(header).encode()
    told += b" " * (-len(told) % 8)
    return len(told).to_bytes(8, "little") + told + BODY[8 + length :]


def metadata() -> dict[str, Any]:
    """Returns the metadata of a sound prefix."""
    length = int.from_bytes(BODY[:8], "little")
    found: dict[str, Any] = json.loads(json.loads(BODY[8 : 8 + length])["__metadata__"]["prefix"])
    return found


def told(value: Any) -> bytes:
    """Returns JSON as an answer."""
    return answer(value if isinstance(value, bytes) else json.dumps(value).encode(), JSON)


def problem(value: Any, *lines: str, status: str = "422 Unprocessable Content") -> bytes:
    """Returns a problem as an answer."""
    return answer(value if isinstance(value, bytes) else json.dumps(value).encode(), PROBLEM, *lines, status=status)


VALUES: Final[list[Any]] = [None, 1, "x", [], [1], {}, True, 1e400, [{}], {"items": 1}]
NO_CURSORS: Final[list[Any]] = [1, [], {}, True, "", "\ud800", "x" * 99_999]
NO_METADATA: Final[list[Any]] = [None, "x", [0], [0, 1e400], -1, [[], []], {"a": 1}]
ANSWERS: dict[str, bytes] = {
    **{f"JSON {value!r}": told(value) for value in VALUES},
    **{f"items {value!r}": told({"items": value, "next": None}) for value in VALUES},
    **{f"items of {value!r}": told({"items": [value], "next": None}) for value in VALUES},
    **{f"next {value!r}": told({"items": [], "next": value}) for value in NO_CURSORS},
    **{f"problem {value!r}": problem(value) for value in VALUES},
    **{f"code {value!r}": problem({"code": value, "detail": value}) for value in VALUES},
    "the client's own codes": problem({"code": "connection-failed", "detail": "x"}),
    "a lone surrogate": problem({"code": "not-found", "detail": "\ud800"}),
    "aliases of another form": told({"items": [{"version": "1", "aliases": {"a": 1}}], "next": None}),
    "aliases that are no names": told({"items": [{"version": 1, "aliases": [[]]}], "next": None}),
    "more items than asked for": told({"items": [{}] * 2000, "next": None}),
    "deep JSON": told(DEEP),
    "deep objects": told(b'{"a":' * 100_000),
    "a deep problem": problem(DEEP),
    "a number of 5,000 digits": told(b'{"items": ' + b"9" * 5000 + b"}"),
    "no JSON": told(b"<html>"),
    "JSON in UTF-16": answer('{"items": []}'.encode("utf-16"), JSON),
    "broken UTF-8": told(b'{"items": "\xff\xfe"}'),
    "NaN": told(b"NaN"),
    "nothing": answer(b"", JSON),
    "another content type": answer(b'{"items": [], "next": null}', "Content-Type: text/html"),
    "no content type": answer(b'{"items": [], "next": null}'),
    "Retry-After that is no number": problem(
        {"code": "unavailable", "detail": "x"}, "Retry-After: ²", status="503 Service Unavailable"
    ).replace("²".encode(), b"\xb2"),
    "Retry-After of 5,000 digits": problem(
        {"code": "unavailable", "detail": "x"}, "Retry-After: " + "9" * 5000, status="503 Service Unavailable"
    ),
    "Retry-After before now": problem({"code": "rate-limited"}, "Retry-After: -5", status="429 Too Many Requests"),
    "bytes beyond ASCII in every header": answer(b"{}", JSON, "ETag: \xff\xfe", "X-Y: \xc3\xa9")
    .decode("latin-1")
    .encode("latin-1"),
    "moved": answer(b"", "Location: http://127.0.0.1:1/", status="302 Found"),
    "moved for ever": answer(b"{}", JSON, "Location: \xff", status="301 Moved Permanently"),
    "not modified, unasked": b"HTTP/1.1 304 Not Modified\r\n\r\n",
    "no content": b"HTTP/1.1 204 No Content\r\n\r\n",
    "a part, unasked": answer(BODY, TENSORS, "Content-Range: bytes 0-9/10", status="206 Partial Content"),
    "switching protocols": b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\n\r\n",
    "a storm of interim answers": b"HTTP/1.1 100 Continue\r\n\r\n" * 50_000 + answer(),
    "status 999": answer(b"{}", JSON, status="999 Unknown"),
    "a gzip bomb": answer(gzip.compress(bytes(50_000_000)), JSON, "Content-Encoding: gzip"),
    "an unknown encoding": answer(b"{}", JSON, "Content-Encoding: zstd, br"),
    "a long head": b"HTTP/1.1 200 OK\r\nX: " + b"y" * 1_000_000 + b"\r\n\r\n",
    "many headers": b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 50_000 + b"\r\n",
    "a length of 17 digits": b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: "
    + b"9" * 17
    + b"\r\n\r\n",
    "a length of 5,000 digits": b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n",
    "a length that is no number": b"HTTP/1.1 200 OK\r\nContent-Length: \xb2\r\n\r\n",
    "a prefix cut off": answer(BODY[:100], TENSORS),
    "a header of 2**63 bytes": answer((2**63).to_bytes(8, "little") + BODY[8:], TENSORS),
    "deep metadata": answer(with_metadata('{"a":' * 100_000), TENSORS),
    "metadata that are a list": answer(with_metadata([1]), TENSORS),
    "no metadata": answer(with_metadata({"format": 1}), TENSORS),
    **{
        f"metadata without {name}": answer(
            with_metadata({key: value for key, value in metadata().items() if key != name}), TENSORS
        )
        for name in metadata()
    },
    **{
        f"metadata with {name} {value!r}": answer(with_metadata({**metadata(), name: value}), TENSORS)
        for name in ("layers", "kv_heads", "num_layers", "num_virtual_tokens", "version", "digest")
        for value in NO_METADATA
    },
}


def failure_of(client: Any, call: Call) -> BaseException | None:
    """Returns the error of a call that no documentation names, or None."""
    try:
        called(client, call)
    except PrefixServiceError as error:
        str(error).encode()
        return None
    except BaseException as error:  # noqa: BLE001 - told by the test
        return error
    return None


SMALL: dict[str, Call] = {**CALLS, "publish_files": lambda client: client.publish_files("a/b", b"{}", io.BytesIO(b"x"))}
READING = ("get", "get_many", "prefetch", "float8_error")
CONTENT_WITH_ANYTHING = {
    *("is_ready", "whoami", "key", "create_key", "shorten_key", "load", "tenant", "put_tenant", "put_alias"),
    *("put_alias once", "card", "put_card", "put_annotations", "put_base_model", "base_model", "config_file"),
}
"""Calls that return any object, or ignore the content."""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SMALL)
def test_only_documented_errors_come_out(kind: type[Any], name: str) -> None:
    """Every method raises only documented errors, for every answer of the table."""
    wrong: dict[str, BaseException] = {}
    took: dict[str, float] = {}
    sent = [b""]

    def script(connection: socket.socket) -> None:
        while read_request(connection):
            connection.sendall(sent[0])

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with hostile_server(script) as server:
        for fault, sent[0] in ANSWERS.items():
            if fault.startswith("metadata") and name not in READING:
                continue
            began = time.monotonic()
            error = failure_of(kind(server.url, timeout=0.3), SMALL[name])
            took[fault] = time.monotonic() - began
            if error is not None:
                wrong[fault] = error
    assert wrong == {}
    assert {fault: seconds for fault, seconds in took.items() if seconds > 40} == {}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KB


IDENTIFIED: Final = {
    "a problem": problem({"code": "not-found", "detail": "x"}, "X-Request-ID: r-1"),
    "a status of nobody's": answer(b"", "X-Request-ID: r-1", status="404 Not Found"),
    "no JSON": answer(b"<html>", JSON, "X-Request-ID: r-1"),
    "a damaged body": answer(BODY[:-1] + b"\xff", TENSORS, "X-Request-ID: r-1").replace(
        repr_digest(BODY[:-1] + b"\xff").encode(), repr_digest().encode()
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("told", IDENTIFIED.values(), ids=IDENTIFIED)
def test_an_error_carries_the_id_of_its_request(kind: type[Any], told: bytes) -> None:
    """Errors of service and client have the request's id, which a traceback shows and the message does not."""
    for name in ("get", "inspect"):
        with hostile_server(says(told)) as server, pytest.raises(PrefixServiceError) as raised:
            called(kind(server.url, timeout=60), CALLS[name])
        assert raised.value.request_id == "r-1"
        assert raised.value.__notes__ == ["request id: r-1"]
        assert "r-1" not in str(raised.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [name for name in CALLS if name not in READING])
def test_what_a_call_makes_of_an_answer_has_its_id(kind: type[Any], name: str) -> None:
    """A call that cannot use an answer raises with the request's id; calls that ignore the content succeed."""
    nonsense = answer(b'{"items": [[]], "next": 1, "a": 2}', JSON, "X-Request-ID: r-1")
    may_succeed: Any = contextlib.nullcontext() if name in CONTENT_WITH_ANYTHING else pytest.raises(PrefixServiceError)
    with hostile_server(says(nonsense)) as server, may_succeed as raised:
        called(kind(server.url, timeout=5), SMALL[name])
    assert raised is None or raised.value.request_id == "r-1"


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_of_a_row_has_the_id_of_its_request(kind: type[Any]) -> None:
    """The error of a row has the id of the request that fetched it."""
    found = problem({"code": "not-found", "detail": "x"}, "X-Request-ID: r-1", status="404 Not Found")
    with hostile_server(says(found)) as server, pytest.raises(NotFound, match="row 1: x") as raised:
        called(kind(server.url, timeout=5), lambda client: client.get_many([None, "a/b"]))
    assert raised.value.request_id == "r-1"


@pytest.mark.parametrize("lines", [(), ("X-Request-ID: a b",), ("X-Request-ID: " + "x" * 129,)])
def test_an_id_that_is_none_is_not_carried(lines: tuple[str, ...]) -> None:
    """The error carries the id that the client sent if the answer's is malformed, which might reach a terminal."""
    told = problem({"code": "not-found", "detail": "x"}, *lines)
    with hostile_server(says(told)) as server, pytest.raises(NotFound) as raised:
        called(PrefixClient(server.url, timeout=60), CALLS["inspect"])
    assert [raised.value.request_id] == ids_sent(server.requests)


def ids_sent(connections: list[list[bytes]]) -> list[str]:
    """The id of each request that came, in order."""
    line = re.compile(rb"\r\nx-request-id: ([0-9a-f]{32})\r\n", re.IGNORECASE)
    return [found.decode() for requests in connections for head in requests for found in line.findall(head)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["get", "inspect", "compose", "publish"])
def test_an_error_without_an_answer_carries_the_id_that_was_sent(
    kind: type[Any], name: str, two_attempts: None
) -> None:
    """The service may have read the request, and logged it: every attempt under one id."""

    def reads(connection: socket.socket) -> None:
        read_request(connection)

    with hostile_server(reads) as server:
        with pytest.raises(ConnectionFailed) as raised:
            called(kind(server.url, timeout=60), SMALL[name])
        ids = ids_sent(server.requests)
    assert set(ids) == {raised.value.request_id}
    assert len(ids) == (1 if name == "compose" else 2)


@pytest.mark.parametrize("kind", KINDS)
def test_two_requests_have_two_ids(kind: type[Any]) -> None:
    """Also of one client, over one connection."""
    told = answer(b'{"items": []}', JSON)
    with hostile_server(says(told, told)) as server, contextlib.suppress(PrefixServiceError):
        called(kind(server.url, timeout=5), lambda client: client.get_many(["a/b", "a/c"]))
    ids = ids_sent(server.requests)
    assert len(ids) == len(set(ids)) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_before_anything_was_sent_has_no_id(kind: type[Any]) -> None:
    """No log could have it."""
    with pytest.raises(ConnectionFailed) as raised:
        called(kind(f"http://127.0.0.1:{free_port()}", timeout=0.3), CALLS["inspect"])
    assert raised.value.request_id is None


@pytest.mark.parametrize("kind", KINDS)
def test_413_of_a_proxy_says_what_to_raise(kind: type[Any]) -> None:
    """A 413 without a problem document is reported as a limit of something in front of the service."""
    page = answer(b"<html>413 Request Entity Too Large</html>", "Content-Type: text/html", status="413 Too Large")
    words = "413 from something in front of the service: raise its body limit"
    with hostile_server(says(page)) as server, pytest.raises(TooLarge, match=words):
        called(kind(server.url, timeout=60), SMALL["publish"])
