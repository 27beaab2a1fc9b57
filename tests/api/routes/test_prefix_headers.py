"""`…/prefix` has HTTP's entity tags, digests, caching, conditions, ranges and HEAD."""

import base64
import hashlib
from itertools import combinations
from typing import Any

import httpx
import pytest
from awscrt.checksums import crc32c

from tests.api.helpers import MEDIA_TYPE, adapter_of, upload_directory
from tests.conftest import Server

TENANT = "headers"
ADAPTER = f"/v1/tenants/{TENANT}/adapters/llama"
PREFIX = f"{ADAPTER}/prefix"


@pytest.fixture(scope="module")
def version(server: Server) -> dict[str, Any]:
    """Publishes an adapter with an alias."""
    client = server.client()
    version = upload_directory(client, TENANT, "llama", adapter_of("llama-n20-emb"))
    assert client.put(f"{ADAPTER}/aliases/prod", json={"version": 1}).status_code in (200, 201)
    return version


@pytest.fixture(scope="module")
def client(server: Server, version: dict[str, Any]) -> httpx.Client:
    """Returns a platform admin's client, once the adapter is published."""
    assert version
    return server.client()


def _digest(body: bytes) -> str:
    return f"sha-256=:{base64.b64encode(hashlib.sha256(body).digest()).decode()}:"


def test_headers_of_an_answer(client: httpx.Client, version: dict[str, Any]) -> None:
    """An answer names its version, its length, and that ranges are served."""
    answer = client.get(PREFIX)
    assert answer.headers["content-type"] == MEDIA_TYPE
    assert answer.headers["prefix-version"] == "1"
    assert answer.headers["prefix-digest"] == version["digest"]
    assert answer.headers["accept-ranges"] == "bytes"
    assert int(answer.headers["content-length"]) == len(answer.content)
    assert "set-cookie" not in answer.headers


@pytest.mark.parametrize(
    ("selector", "wanted"), [("", "no-cache"), ("@latest", "no-cache"), ("@prod", "no-cache"), ("@1", "immutable")]
)
def test_cache_control(client: httpx.Client, selector: str, wanted: str) -> None:
    """A version never changes; an alias and `latest` are revalidated; nothing is for shared caches."""
    directives = client.get(f"{ADAPTER}{selector}/prefix").headers["cache-control"].split(", ")
    assert "private" in directives
    assert ("immutable" in directives, "no-cache" in directives) == (wanted == "immutable", wanted == "no-cache")


def test_cache_control_of_a_digest(client: httpx.Client, version: dict[str, Any]) -> None:
    """An answer to a digest is as immutable as one to a number."""
    assert "immutable" in client.get(f"{ADAPTER}@{version['digest']}/prefix").headers["cache-control"]


def test_etag_is_strong_and_the_same_for_the_same_request(client: httpx.Client) -> None:
    """Two spellings of one request have one entity tag and the same bytes."""
    spelled = ["", "?batch_size=1", "?dtype=float32", "?layers=0:3&kv_heads=0:2", "?mask_dtype=int64", "?expand=true"]
    answers = [client.get(PREFIX + query) for query in spelled]
    assert len({answer.headers["etag"] for answer in answers}) == 1
    assert len({answer.content for answer in answers}) == 1
    etag = answers[0].headers["etag"]
    assert etag.startswith('"')
    assert etag.endswith('"')


def test_etag_differs_where_bytes_differ(client: httpx.Client) -> None:
    """Every option that changes the bytes changes the entity tag."""
    queries = [
        "",
        "batch_size=2",
        "dtype=float16",
        "dtype=float8_e4m3fn",
        "key_dtype=float16",
        "value_dtype=float16",
        "layout=stacked",
        "layers=0:1",
        "layers=1:2",
    ]
    queries += ["kv_heads=0:1", "mask_dtype=bool", "mask_dtype=float32", "expand=false", "batch_size=2&expand=false"]
    answers = [client.get(f"{PREFIX}?{query}") for query in queries]
    for one, other in combinations(answers, 2):
        assert one.headers["etag"] != other.headers["etag"]
        assert one.content != other.content


@pytest.mark.parametrize("query", ["", "?batch_size=1&dtype=bfloat16", "?batch_size=7&expand=false"])
def test_repr_digest_of_one_rendering(client: httpx.Client, query: str) -> None:
    """A body that is one rendering always has its SHA-256."""
    answer = client.get(PREFIX + query)
    assert answer.headers["repr-digest"] == _digest(answer.content)


def test_repr_digest_of_a_batch_only_on_request(client: httpx.Client) -> None:
    """Hashing repeated rows costs time, so Want-Repr-Digest has to ask for it."""
    assert "repr-digest" not in client.get(f"{PREFIX}?batch_size=3").headers
    for wanted in ("sha-256=1", "sha-512=3, sha-256=10", "sha-256"):
        answer = client.get(f"{PREFIX}?batch_size=3", headers={"Want-Repr-Digest": wanted})
        assert answer.headers["repr-digest"] == _digest(answer.content)
    for other in ("sha-512=1", "sha-256=0"):
        assert "repr-digest" not in client.get(f"{PREFIX}?batch_size=3", headers={"Want-Repr-Digest": other}).headers


@pytest.mark.parametrize("query", ["", "?batch_size=3"])
def test_repr_digest_in_the_algorithm_that_is_preferred(client: httpx.Client, query: str) -> None:
    """Want-Repr-Digest chooses between SHA-256 and CRC-32C by its preferences (RFC 9530, section 4)."""
    for wanted in ("crc32c=1", "sha-256=1, crc32c=2", "crc32c", "md5=10, crc32c=1, sha-256=0"):
        answer = client.get(PREFIX + query, headers={"Want-Repr-Digest": wanted})
        checksum = crc32c(answer.content).to_bytes(4, "big")
        assert answer.headers["repr-digest"] == f"crc32c=:{base64.b64encode(checksum).decode()}:"
    for wanted in ("crc32c=2, sha-256=2", "crc32c=0, sha-256=1"):
        answer = client.get(PREFIX + query, headers={"Want-Repr-Digest": wanted})
        assert answer.headers["repr-digest"] == _digest(answer.content)


@pytest.mark.parametrize("form", ["{}", "W/{}", '"other", {}', "*"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_if_none_match(client: httpx.Client, method: str, form: str) -> None:
    """If the caller has the entity tag, the answer is a 304 without a body, by weak comparison."""
    full = client.get(PREFIX)
    answer = client.request(method, PREFIX, headers={"If-None-Match": form.format(full.headers["etag"])})
    assert answer.status_code == 304
    assert answer.content == b""
    for name in ("etag", "cache-control", "prefix-version", "prefix-digest"):
        assert answer.headers[name] == full.headers[name]


def test_if_none_match_of_something_else(client: httpx.Client) -> None:
    """Another entity tag, or text of another form, is answered with the whole body."""
    other = client.get(f"{PREFIX}?batch_size=2").headers["etag"]
    for tag in (other, '"x"', other.strip('"'), ""):
        assert client.get(PREFIX, headers={"If-None-Match": tag}).status_code == 200


@pytest.mark.parametrize(
    ("value", "start", "stop"),
    [
        ("0-0", 0, 1),
        ("0-", 0, None),
        ("5-99", 5, 100),
        ("-7", -7, None),
        ("1000-99999999", 1000, None),
        ("-99999999", 0, None),
    ],
)
@pytest.mark.parametrize("path", [f"{PREFIX}?batch_size=2", f"{PREFIX}?layout=stacked", f"{ADAPTER}/parameters"])
def test_one_range(client: httpx.Client, path: str, value: str, start: int, stop: int | None) -> None:
    """One range is a 206 with exactly those bytes, in whichever buffers they are."""
    whole = client.get(path).content
    answer = client.get(path, headers={"Range": f"bytes={value}"})
    first, last, _ = slice(start, stop).indices(len(whole))
    assert answer.status_code == 206
    assert answer.content == whole[start:stop]
    assert answer.headers["content-range"] == f"bytes {first}-{last - 1}/{len(whole)}"
    assert int(answer.headers["content-length"]) == len(answer.content)


def test_repr_digest_of_a_range_is_that_of_the_whole(client: httpx.Client) -> None:
    """A representation's digest does not change with the range (RFC 9530)."""
    answer = client.get(PREFIX, headers={"Range": "bytes=8-15"})
    assert answer.headers["repr-digest"] == _digest(client.get(PREFIX).content)


def test_every_cut_of_the_body_is_served(client: httpx.Client) -> None:
    """Pieces that are fetched one by one make the whole, wherever they are cut."""
    query = f"{PREFIX}?batch_size=3&dtype=float16&layers=0:2&mask_dtype=bool"
    whole, pieces, step = client.get(query).content, b"", 997
    for at in range(0, len(whole), step):
        pieces += client.get(query, headers={"Range": f"bytes={at}-{at + step - 1}"}).content
    assert pieces == whole


@pytest.mark.parametrize(
    "value", ["bytes=5-2", "bytes=a-b", "bytes=", "bytes", "lines=0-5", "bytes=--5", "bytes=0-1,5-6"]
)
def test_ranges_that_are_ignored(client: httpx.Client, value: str) -> None:
    """A value that is no valid single byte range is answered with the whole body."""
    assert client.get(PREFIX, headers={"Range": value}).status_code == 200


def test_if_range(client: httpx.Client) -> None:
    """A range counts only while the caller's entity tag is current, by strong comparison."""
    etag = client.get(PREFIX).headers["etag"]
    for condition, status in ((etag, 206), ('"x"', 200), (f"W/{etag}", 200), ("Sat, 01 Jan 2028 00:00:00 GMT", 200)):
        answer = client.get(PREFIX, headers={"Range": "bytes=0-9", "If-Range": condition})
        assert answer.status_code == status, condition


@pytest.mark.parametrize("query", ["", "?batch_size=3", "?batch_size=3&expand=false&dtype=float8_e4m3fn"])
@pytest.mark.parametrize("headers", [{}, {"Range": "bytes=3-9"}, {"Want-Repr-Digest": "sha-256=1"}], ids=str)
def test_head(client: httpx.Client, query: str, headers: dict[str, str]) -> None:
    """HEAD answers what GET would, without the body."""
    get, answer = (client.request(method, PREFIX + query, headers=headers) for method in ("GET", "HEAD"))
    assert answer.content == b""
    assert answer.status_code == get.status_code
    of_each = {"date", "x-request-id"}
    assert {k: v for k, v in answer.headers.items() if k not in of_each} == {
        k: v for k, v in get.headers.items() if k not in of_each
    }


def test_parameters_have_the_same_manners(client: httpx.Client, version: dict[str, Any]) -> None:
    """The weights file too has an entity tag and a digest, and its route answers conditions."""
    path = f"{ADAPTER}@1/parameters"
    answer = client.get(path)
    assert answer.headers["repr-digest"] == _digest(answer.content)
    assert answer.headers["prefix-digest"] == version["digest"]
    assert "immutable" in answer.headers["cache-control"]
    assert client.get(path, headers={"If-None-Match": answer.headers["etag"]}).status_code == 304
    assert client.head(path).headers["content-length"] == str(len(answer.content))
