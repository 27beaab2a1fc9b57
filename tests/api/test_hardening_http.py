"""Abuse of HTTP: bodies, ranges, hosts, paths, limits, media types, and keys that are checked before the body."""

import gzip
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.api.helpers import (
    CONFIG,
    MEDIA_TYPE,
    assert_alive,
    head,
    peak_memory,
    problem,
    raw,
    read_answer,
    upload,
    versions_path,
    weights,
)
from tests.conftest import Server, running_server

TENANT = "hard-http"
ADAPTER = f"/v1/tenants/{TENANT}/adapters/a"
LIMIT = 64 << 20
WRITES = [
    ("POST", f"{ADAPTER}/versions", "multipart/form-data; boundary=x"),
    ("POST", f"{ADAPTER}/versions", "application/json"),
    ("POST", f"{ADAPTER}/prefix", "application/json"),
    ("POST", f"{ADAPTER}/prefix", MEDIA_TYPE),
    ("PUT", f"{ADAPTER}/aliases/prod", "application/json"),
    ("PUT", f"{ADAPTER}/residency", "application/json"),
    ("POST", f"/v1/tenants/{TENANT}/keys", "application/json"),
    ("POST", "/v1/keys", "application/json"),
]


@pytest.fixture(scope="module")
def client(server: Server) -> httpx.Client:
    """Yields a client with a key of the platform's admin, and publishes one adapter."""
    client = server.client()
    assert upload(client, TENANT, "a").status_code == 201
    return client


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Yields a service that accepts uploads up to 64 MiB, and other bodies up to 1 MiB."""
    limits = {"PREFIX_MAX_UPLOAD_BYTES": str(LIMIT), "PREFIX_MAX_REQUEST_BYTES": str(1 << 20)}
    with running_server(tmp_path_factory.mktemp("small") / "data", environment=limits) as running:
        yield running


def _multipart(parts: int, preamble: bytes = b"", config: bytes = json.dumps(CONFIG).encode()) -> Iterator[bytes]:
    """Returns an upload whose weights have `parts` MiB, as it is sent."""
    yield preamble
    yield b'--x\r\nContent-Disposition: form-data; name="adapter_config.json"\r\n\r\n' + config + b"\r\n"
    yield b'--x\r\nContent-Disposition: form-data; name="adapter_model.safetensors"\r\n\r\n'
    for _ in range(parts):
        yield b"\0" * (1 << 20)
    yield b"\r\n--x--\r\n"


def _chunked(server: Server, pieces: Iterator[bytes], path: str = f"{ADAPTER}/versions") -> tuple[int, str]:
    """Sends a chunked upload to its end, or until the service hangs up; returns status and code of the answer."""
    address = urlsplit(server.url)
    fields = {"Authorization": f"Bearer {server.admin_key}", "Content-Type": "multipart/form-data; boundary=x"}
    with socket.create_connection((address.hostname, address.port), timeout=60) as connection:
        connection.sendall(head("POST", path, Transfer_Encoding="chunked", **fields))
        try:
            for piece in pieces:
                if piece:
                    connection.sendall(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
            connection.sendall(b"0\r\n\r\n")
        except (BrokenPipeError, ConnectionResetError):
            pass
        answer = read_answer(connection)
    return answer.status, json.loads(answer.body)["code"]


def test_chunked_upload_above_the_limit_in_flat_memory(small: Server) -> None:
    """400 MiB without a declared length are refused with 413 while they arrive, and take no memory."""
    before = peak_memory(small)
    assert _chunked(small, _multipart(400)) == (413, "too-large")
    assert peak_memory(small) - before < 32 << 20
    problem(small.client().get(ADAPTER), 404)
    assert list((small.data_dir / "blobs" / "staging").iterdir()) == []
    assert_alive(small)


def test_upload_below_the_limit_streams_to_the_disk(small: Server) -> None:
    """An upload within the limit takes no memory either: 60 MiB of zeros are refused for their content."""
    before = peak_memory(small)
    status, code = _chunked(small, _multipart(60))
    assert (status, code) == (422, "invalid-checkpoint")
    # Read back once, to be checked.
    assert peak_memory(small) - before < (60 + 32) << 20


@pytest.mark.parametrize("where", ["preamble", "epilogue", "config", "part header"])
def test_what_is_no_weights_is_bounded_too(small: Server, where: str) -> None:
    """Bytes in front of the parts, behind them, in their headers and in the config are bounded."""
    before, filler = peak_memory(small), b"x" * (1 << 20)
    if where == "preamble":
        pieces = iter([b"--x\r\n", *[filler] * 100])
    elif where == "epilogue":
        pieces = iter([*_multipart(0), *[filler] * 100])
    elif where == "config":
        pieces = _multipart(0, config=filler * 100)
    else:
        pieces = iter([b"--x\r\nContent-Disposition: form-data; name=", *[filler] * 100])
    status, code = _chunked(small, pieces)
    assert (status, code) in {(413, "too-large"), (422, "invalid-request")}
    assert peak_memory(small) - before < 32 << 20
    assert_alive(small)


@pytest.mark.parametrize(("method", "path", "media_type"), WRITES, ids=[f"{w[1]} {w[2]}" for w in WRITES])
def test_declared_length_above_the_limit(small: Server, method: str, path: str, media_type: str) -> None:
    """A Content-Length above the limit is 413 before a byte of the body is sent."""
    upload(small.client(), TENANT, "a")
    key = f"Bearer {small.admin_key}"
    answer = raw(small, head(method, path, Authorization=key, Content_Type=media_type, Content_Length="10000000000"))
    assert (answer.status, json.loads(answer.body)["code"]) == (413, "too-large")


def test_json_above_the_limit_chunked(small: Server) -> None:
    """Bodies other than uploads have a limit of their own, in which chunks count."""
    client = small.client()
    upload(client, TENANT, "a")

    def chunks() -> Iterator[bytes]:
        yield b'{"attention_mask": [['
        for _ in range(3):
            yield b"1," * (1 << 19)
        yield b"1]]}"

    answer = client.post(f"{ADAPTER}/prefix", content=chunks(), headers={"Content-Type": "application/json"})
    problem(answer, 413, "too-large")


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd", "gzip, identity", "GZIP"])
@pytest.mark.parametrize(("method", "path", "media_type"), WRITES, ids=[f"{w[1]} {w[2]}" for w in WRITES])
def test_compressed_bodies(client: httpx.Client, method: str, path: str, media_type: str, encoding: str) -> None:
    """Compressed bodies are 415, whatever they contain."""
    headers = {"Content-Type": media_type, "Content-Encoding": encoding}
    body = gzip.compress(b'{"scope": "read", "version": 1}')
    problem(client.request(method, path, content=body, headers=headers), 415, "unsupported-media-type")


@pytest.mark.parametrize("path", ["prefix", "parameters"])
@pytest.mark.parametrize("ranges", ["0-0,2-2", ",".join(f"{n}-{n}" for n in range(1_000)), "0-,0-,0-", "0-1,-1"])
def test_many_ranges_are_ignored(client: httpx.Client, path: str, ranges: str) -> None:
    """A request for several ranges gets the whole body once (CVE-2025-62727)."""
    whole = client.get(f"{ADAPTER}/{path}")
    answer = client.get(f"{ADAPTER}/{path}", headers={"Range": f"bytes={ranges}"})
    assert answer.status_code == 200
    assert answer.content == whole.content


@pytest.mark.parametrize("path", ["prefix", "parameters"])
@pytest.mark.parametrize("value", ["100000000-", "100000000-200000000", "-0", f"{10**30}-"])
def test_range_outside_the_body(client: httpx.Client, path: str, value: str) -> None:
    """A range that cannot be satisfied is 416, with the length in Content-Range."""
    length = len(client.get(f"{ADAPTER}/{path}").content)
    answer = client.get(f"{ADAPTER}/{path}", headers={"Range": f"bytes={value}"})
    problem(answer, 416, "range-not-satisfiable")
    assert answer.headers["content-range"] == f"bytes */{length}"


@pytest.mark.parametrize("host", ["localhost/livez?", "localhost/livez#", "/livez", "x@localhost/docs", "[::1", "a b"])
def test_host_header_does_not_move_the_request(server: Server, client: httpx.Client, host: str) -> None:
    """Authorisation uses the path as it was received, not a URL that is built from the Host header (CVE-2026-48710)."""
    answer = raw(server, head("GET", ADAPTER, Host=host))
    assert answer.status in (400, 401)
    key = client.headers["Authorization"]
    answer = raw(server, head("GET", f"{ADAPTER}x", Host=host, Authorization=key))
    assert answer.status in (400, 404)


HOSTILE = ["%2e%2e%2f", "%252e", "%00", "%ff", "..", "%2e%2e", "a%2fb", "a%252fb", "a%5cb", "A", "a%20b", "a%0d%0a"]
HOSTILE += ["x" * 65, "-a", "a..b", "%c3%a9", "a;b", "a@", "a@@1", "a@0", "a@01", "a@1.0", "a@-1", "a@sha256:", "@1"]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names(server: Server, client: httpx.Client, name: str) -> None:
    """Malformed names, encoded once or twice, are 404 or 422 in every place of a path, never a file or a 500."""
    key = client.headers["Authorization"]
    paths = [f"/v1/tenants/{TENANT}/adapters/{name}{rest}" for rest in ("", "/prefix", "/parameters", "/residency")]
    if "@" not in name:
        paths += [f"/v1/tenants/{name}", f"/v1/tenants/{name}/adapters", f"{ADAPTER}/aliases/{name}"]
    for path in paths:
        answer = raw(server, head("GET", path, Authorization=key))
        assert answer.status in (404, 422), path
        assert answer.headers["content-type"] == "application/problem+json"
    for method, path in (("PUT", f"/v1/tenants/{name}"), ("POST", versions_path(TENANT, name))):
        length = {"Content_Length": "2", "Content_Type": "application/json"}
        answer = raw(server, head(method, path, Authorization=key, **length), b"{}")
        assert answer.status in (404, 422), path


@pytest.mark.parametrize("rest", ["%2Fprefix", "%2fprefix", "%40latest%2Fprefix", "%2540latest/prefix", "%252e"])
def test_slash_in_a_segment_and_double_encoding(server: Server, client: httpx.Client, rest: str) -> None:
    """`%2F` does not become a slash between segments, and nothing is decoded twice: both are 404."""
    assert raw(server, head("GET", f"{ADAPTER}{rest}", Authorization=client.headers["Authorization"])).status == 404


@pytest.mark.parametrize("path", [b"/v1/\xff", b"/v1/tenants/\xc3\xa9/adapters", b"/v1/tenants/a\x01"])
def test_bytes_that_do_not_belong_into_a_path(server: Server, client: httpx.Client, path: bytes) -> None:
    """Raw bytes outside ASCII in a path are refused, and the process goes on."""
    lines = [b"GET " + path + b" HTTP/1.1", b"Host: x", b"Authorization: " + client.headers["Authorization"].encode()]
    assert raw(server, b"\r\n".join([*lines, b"", b""])).status in (400, 404, 422)
    assert_alive(server)


@pytest.mark.parametrize("limit", [10**9, 1001, 0, -1, "x", "1.5", "9" * 5000, ""])
def test_limits_of_listings(client: httpx.Client, limit: Any) -> None:
    """The limit of a page is 1 to 1,000 items."""
    for path in (f"/v1/tenants/{TENANT}/adapters", "/v1/tenants"):
        problem(client.get(path, params={"limit": limit}), 422, "invalid-request")


@pytest.mark.parametrize("size", [0, -1, 257, 10**6, 10**30, "x", "1.5", "9" * 5000, ""])
def test_batch_sizes(client: httpx.Client, size: Any) -> None:
    """The size of a batch is 1 to the configured maximum."""
    problem(client.get(f"{ADAPTER}/prefix", params={"batch_size": size}), 422, "invalid-request")
    problem(client.post(f"{ADAPTER}/prefix", json={"batch_size": size}), 422, "invalid-request")


@pytest.mark.parametrize(
    "media_type", ["", "text/plain", "application/xml", "application/json, text/plain", "json", "*/*"]
)
@pytest.mark.parametrize(("method", "path"), sorted({write[:2] for write in WRITES}))
def test_wrong_media_types(client: httpx.Client, method: str, path: str, media_type: str) -> None:
    """A body with another media type or none is 415: nothing is guessed."""
    headers = {"Content-Type": media_type} if media_type else {}
    answer = client.request(method, path, content=b'{"version": 1, "scope": "read"}', headers=headers)
    problem(answer, 415, "unsupported-media-type")


@pytest.mark.parametrize("first", ["application/json", "application/json; charset=utf-8"])
def test_two_media_types(server: Server, client: httpx.Client, first: str) -> None:
    """Two Content-Type headers, which two readers could take differently, are refused."""
    lines = head("POST", f"{ADAPTER}/prefix", Authorization=client.headers["Authorization"], Content_Length="2")
    both = f"Content-Type: {first}\r\nContent-Type: {MEDIA_TYPE}\r\n\r\n".encode()
    assert raw(server, lines.removesuffix(b"\r\n") + both + b"{}").status == 415


def test_kinds_that_belong_elsewhere(client: httpx.Client) -> None:
    """A media type that only another route takes is 415."""
    problem(client.post(f"{ADAPTER}/prefix", files={"attention_mask": b"1"}), 415)
    headers = {"Content-Type": MEDIA_TYPE}
    problem(client.post(f"{ADAPTER}/versions", content=weights(), headers=headers), 415)
    problem(client.put(f"{ADAPTER}/aliases/prod", content=b"{}", headers=headers), 415)


@pytest.mark.parametrize("boundary", ["", "; boundary=", "; boundary=" + "x" * 300, "; boundary=other"])
def test_multipart_with_a_bad_boundary(client: httpx.Client, boundary: str) -> None:
    """A boundary that is missing, too long or not the one in the body is a 422."""
    headers = {"Content-Type": f"multipart/form-data{boundary}"}
    answer = client.post(f"{ADAPTER}/versions", content=b"".join(_multipart(0)), headers=headers)
    problem(answer, 422, "invalid-request")


@pytest.mark.parametrize(
    "accept", ["text/html", "application/json;q=0, application/vnd.safetensors;q=0", "image/*", "x"]
)
@pytest.mark.parametrize("path", ["/prefix", "/parameters", "", "/versions"])
def test_unacceptable_accept(client: httpx.Client, path: str, accept: str) -> None:
    """A caller that does not accept the answer's media type gets 406, which names that media type."""
    problem(client.get(f"{ADAPTER}{path}", headers={"Accept": accept}), 406, "not-acceptable")


@pytest.mark.parametrize(
    "accept",
    ["*/*", "application/*", f"text/html, {MEDIA_TYPE};q=0.1", f"{MEDIA_TYPE}, */*;q=0", "", "TEXT/x, */*;q=0.01"],
)
def test_acceptable_accept(client: httpx.Client, accept: str) -> None:
    """Wildcards and weights in Accept (RFC 9110) are understood."""
    assert client.get(f"{ADAPTER}/prefix", headers={"Accept": accept}).status_code == 200


@pytest.mark.parametrize("key", ["", "Bearer pfx_0000000000000000_" + "0" * 48 + "_00000000", "Basic eDp4"])
@pytest.mark.parametrize(("method", "path", "media_type"), WRITES, ids=[f"{w[1]} {w[2]}" for w in WRITES])
def test_no_key_is_refused_before_the_body(server: Server, method: str, path: str, media_type: str, key: str) -> None:
    """Without a key the 401 comes before any byte of the announced body is sent, and without `100 Continue`."""
    fields = {"Content_Type": media_type, "Content_Length": str(1 << 30), "Expect": "100-continue"}
    answer = raw(server, head(method, path, **fields, **({"Authorization": key} if key else {})), timeout=60)
    assert answer.status == 401
    assert answer.headers["www-authenticate"].startswith("Bearer")
    assert answer.headers["content-type"] == "application/problem+json"


def test_too_small_a_scope_is_refused_before_the_body(server: Server, client: httpx.Client) -> None:
    """A key that may not write, and another tenant's key, are refused before the body."""
    fields = {"Content_Type": "application/json", "Content_Length": str(1 << 30)}
    key = client.post(f"/v1/tenants/{TENANT}/keys", json={"scope": "read"}).json()["key"]
    answer = raw(server, head("POST", f"{ADAPTER}/versions", Authorization=f"Bearer {key}", **fields), timeout=60)
    assert answer.status == 403
    answer = raw(server, head("POST", "/v1/tenants/other/adapters/a/versions", Authorization=f"Bearer {key}", **fields))
    assert answer.status == 404


def test_errors_tell_nothing_of_the_inside(client: httpx.Client, server: Server) -> None:
    """No error contains a path, a host name or a stack trace of the service."""
    for path in ("/v1/tenants/none/adapters/x", "/nowhere", f"{ADAPTER}/prefix?dtype=x", f"{ADAPTER}@9/prefix"):
        text = client.get(path).text
        assert not any(str(folder) in text for folder in server.folders())
        assert "Traceback" not in text
        assert str(Path.cwd()) not in text
