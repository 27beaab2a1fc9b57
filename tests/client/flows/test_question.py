"""The client compares each answer with its question on every way, and neither returns nor caches a wrong one."""

import asyncio
import io
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from prefix_service.client import AsyncPrefixClient, Prefix, PrefixClient
from prefix_service.client.cache.disk_cache import DiskCache, Entry
from prefix_service.client.flows.question import Question
from prefix_service.errors import InvalidResponse
from tests.client.conftest import Awaited, Counting
from tests.client.hostile import BODY, answer, hostile_server, says
from tests.client.meddling_proxy import Meddler, meddling_proxy
from tests.conftest import Server
from tests.sharing import sharing_server

# 2 layers, 2 heads of 8, 4 tokens, float32.
CONFIG = {
    "peft_type": "PREFIX_TUNING",
    "task_type": "CAUSAL_LM",
    "num_virtual_tokens": 4,
    "num_layers": 2,
    "num_attention_heads": 2,
    "token_dim": 16,
    "inference_mode": True,
}
ADAPTERS = (("swap", "a"), ("swap", "a"), ("swap", "b"), ("other", "a"))  # of one shape; swap/a has two versions


def publish_all(server: Server) -> None:
    """Publishes untrained versions, each with other random values."""
    with server.client() as http:
        for seed, (tenant, name) in enumerate(ADAPTERS):
            path = f"/v1/tenants/{tenant}/adapters/{name}/versions"
            made = http.post(path, json={"config": CONFIG, "seed": seed})
            assert made.is_success, made.text


@pytest.fixture(scope="module", autouse=True)
def adapters(server: Server) -> None:
    """Publishes four versions that could be mistaken for each other."""
    publish_all(server)


@pytest.fixture
def proxy(server: Server) -> Iterator[Meddler]:
    """Yields a proxy to the service that can change the question."""
    with meddling_proxy(server.url) as meddler:
        yield meddler


def is_same(one: Prefix, other: Prefix) -> bool:
    """Returns whether two prefixes are one version in one form."""
    return one.metadata == other.metadata and torch.equal(one.kv.tensor, other.kv.tensor)


# Each row has the reference, the form, what the request says, and what the service is asked instead.
SWAPS: dict[str, tuple[str, dict[str, Any], bytes, bytes]] = {
    "adapter": ("swap/a@1", {}, b"/adapters/a@1/", b"/adapters/b@1/"),
    "adapter of latest": ("swap/a", {}, b"/adapters/a/", b"/adapters/b/"),
    "tenant": ("swap/a@1", {}, b"/tenants/swap/", b"/tenants/other/"),
    "tenant of latest": ("swap/a", {}, b"/tenants/swap/", b"/tenants/other/"),
    "version": ("swap/a@1", {}, b"a@1/", b"a@2/"),
    "digest": ("swap/a@{digest}", {}, b"a@{digest}/", b"a@2/"),
    "dtype of the same size": ("swap/a@1", {"dtype": "float16"}, b"dtype=float16", b"dtype=bfloat16"),
    "stored dtype": ("swap/a@1", {}, b"expand=false", b"expand=false&dtype=float8_e4m3fn"),
    "dtype of keys": ("swap/a@1", {"key_dtype": "float16"}, b"key_dtype=float16", b"value_dtype=float16"),
    "dtype of values": ("swap/a@1", {"value_dtype": "float16"}, b"&value_dtype=float16", b""),
    "stored dtype of keys": ("swap/a@1", {"value_dtype": "float16"}, b"layout", b"key_dtype=float8_e4m3fn&layout"),
    "layers": ("swap/a@1", {"layers": (0, 1)}, b"layers=0%3A1", b"layers=1%3A2"),
    "stage": ("swap/a@1", {"pp": (0, 1)}, b"layers=0%3A1", b"layers=1%3A2"),
    "heads": ("swap/a@1", {"kv_heads": (0, 1)}, b"kv_heads=0%3A1", b"kv_heads=1%3A2"),
    "rank": ("swap/a@1", {"tp": (0, 2)}, b"tp=0%2F2", b"tp=1%2F2"),
    "whole": ("swap/a@1", {}, b"expand=false", b"expand=false&layers=0%3A1"),
    "batch": ("swap/a@1", {}, b"expand=false", b"expand=false&batch_size=3"),
    "rows": ("swap/a@1", {}, b"expand=false", b"expand=true"),
    "layout": ("swap/a@1", {}, b"layout=stacked", b"layout=layers"),
}
POOLS: dict[str, dict[str, Any]] = {
    "socket": {},
    "verified": {"verify_digest": True},
    "ranges": {"connections": 2},
    "disk": {"cache_dir": "{folder}"},
}


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("swap", SWAPS)
def test_an_answer_to_another_question_is_an_error_and_is_not_cached(
    connect: Callable[..., Any], server: Server, proxy: Meddler, tmp_path: Path, pool: str, swap: str
) -> None:
    """If a proxy confuses two requests, the call raises, and the next call gets its own answer."""
    reference, form, asked, other = SWAPS[swap]
    with PrefixClient(server.url, server.admin_key) as direct:
        digest = direct.inspect("swap/a@1")["digest"]
        reference = reference.format(digest=digest)
        expected = direct.get(reference, **form)
    options = {name: tmp_path if value == "{folder}" else value for name, value in POOLS[pool].items()}
    client = connect(proxy.url, **options)
    proxy.swaps = {asked.replace(b"{digest}", digest.encode()): other}
    with pytest.raises(InvalidResponse, match=r"swap/a|rows|shape|expand|layout|attention_mask"):
        client.get(reference, **form)
    assert proxy.swapped
    assert list(tmp_path.iterdir()) == []
    proxy.swaps = {}
    assert is_same(client.get(reference, **form), expected)


def test_the_error_says_what_was_asked_and_what_came(proxy: Meddler, server: Server) -> None:
    """The error names the question and each difference."""
    proxy.swaps = {b"/tenants/swap/adapters/a@1/": b"/tenants/other/adapters/a@1/", b"layers=0%3A1": b"layers=1%3A2"}
    with PrefixClient(proxy.url, server.admin_key) as client, pytest.raises(InvalidResponse) as raised:
        client.get("swap/a@1", layers=(0, 1), dtype="float16")
    assert str(raised.value) == (
        "the answer is not about swap/a@1 (dtype=float16, layers=(0, 1)): "
        "it has tenant 'other' instead of 'swap', layers [1, 2] instead of [0, 1]"
    )


@pytest.mark.parametrize("wanted", [{"key_dtype": "float16"}, {"dtype": "float16", "value_dtype": "float32"}], ids=str)
def test_an_older_service_that_ignores_two_dtypes_is_an_error(wanted: dict[str, Any]) -> None:
    """Its metadata has `dtype` alone, which is compared with both."""
    about = {"tenant": "a", "adapter": "b", "version": 1, "digest": "c", "num_layers": 2, "num_kv_heads": 2}
    about |= {"layers": [0, 2], "kv_heads": [0, 2], "batch_size": 1, "layout": "layers", "expand": False}
    question = Question.of("a/b", {**wanted})  # type: ignore[typeddict-item]  # the keys are those of PrefixOptions
    with pytest.raises(InvalidResponse, match=r"it has key_dtype 'bfloat16' instead of 'float16'"):
        question.require_answer({**about, "dtype": "bfloat16"}, {})
    question.require_answer({**about, "dtype": None, "key_dtype": "float16", "value_dtype": "float32"}, {})


def test_an_httpx_transport_of_ones_own_is_compared_too(proxy: Meddler, server: Server) -> None:
    """Answers of a caller's own httpx transport are compared too."""
    proxy.swaps = {b"/adapters/a@1/": b"/adapters/b@1/"}
    with PrefixClient(proxy.url, server.admin_key, http=Counting()) as client, pytest.raises(InvalidResponse):
        client.get("swap/a@1")


def test_get_many_names_the_row_that_came_wrong(connect: Callable[..., Any], proxy: Meddler) -> None:
    """The error names the row, and a batch is made only of right answers."""
    client = connect(proxy.url)
    proxy.swaps = {b"/adapters/b@1/": b"/adapters/a@1/"}
    with pytest.raises(InvalidResponse, match=r"row 1: .*adapter 'a' instead of 'b'"):
        client.get_many(["swap/a@1", "swap/b@1"])
    proxy.swaps = {}
    assert client.get_many(["swap/a@1", "swap/b@1"]).metadata["rows"][1]["ref"] == "swap/b@1"


@pytest.mark.parametrize(
    "swaps",
    [
        {b"&dtype=float8_e4m3fn": b""},
        {b"/adapters/a/": b"/adapters/b/"},
        {b"a@sha256:": b"b@1?", b"&dtype=float8_e4m3fn": b"&dtype=float8_e4m3fn&x="},
    ],
    ids=["dtype", "exact", "found"],
)
def test_float8_error_compares_one_version(connect: Callable[..., Any], proxy: Meddler, swaps: Any) -> None:
    """`float8_error` does not compare another adapter's values, or those of another dtype."""
    client = connect(proxy.url)
    if b"a@sha256:" in swaps:
        digest = client.inspect("swap/a")["digest"].encode()
        swaps = {b"/adapters/a@" + digest: b"/adapters/b@1"}
    proxy.swaps = swaps
    with pytest.raises(InvalidResponse):
        client.float8_error("swap/a")
    proxy.swaps = {}
    assert client.float8_error("swap/a").keys.max_absolute > 0


@pytest.mark.parametrize(
    ("reference", "swaps", "told"),
    [
        ("swap/a@1", {b"/adapters/a@1": b"/adapters/b@1"}, "adapter 'b' instead of 'a'"),
        ("swap/a", {b"/tenants/swap/": b"/tenants/other/"}, "tenant 'other' instead of 'swap'"),
        ("swap/a@1", {b"/adapters/a@1": b"/adapters/a@2"}, "version 2 instead of 1"),
        ("swap/a@1", {b"/adapters/a@1 ": b"/adapters/a/versions "}, "does not describe a version"),
        ("swap/a@1", {b"/v1/tenants/swap/adapters/a@1 ": b"/readyz "}, "does not describe a version"),
    ],
)
def test_inspect_describes_the_version_that_was_asked_for(
    connect: Callable[..., Any], proxy: Meddler, reference: str, swaps: dict[bytes, bytes], told: str
) -> None:
    """Another version's description raises InvalidResponse."""
    proxy.swaps = swaps
    with pytest.raises(InvalidResponse, match=told):
        connect(proxy.url).inspect(reference)


def test_publish_and_compose_report_the_adapter_that_was_meant(connect: Callable[..., Any], proxy: Meddler) -> None:
    """A version that was made of another adapter is not reported as success."""
    client = connect(proxy.url)
    config = json.dumps({**CONFIG, "num_transformer_submodules": 1, "prefix_projection": False}).encode()
    weights = save({"prompt_embeddings": torch.ones(4, 2 * 2 * 16)})
    proxy.swaps = {b"/adapters/published/": b"/adapters/elsewhere/"}
    with pytest.raises(InvalidResponse, match="adapter 'elsewhere' instead of 'published'"):
        client.publish_files("swap/published", config, io.BytesIO(weights))
    with pytest.raises(InvalidResponse, match="adapter 'elsewhere' instead of 'published'"):
        client.compose("swap/published", ["swap/a@1", "swap/b@1"])
    proxy.swaps = {}
    assert client.publish_files("swap/published", config, io.BytesIO(weights))[0]["adapter"] == "published"


NOT_MODIFIED = "304 Not Modified"


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ((), "entity tag none instead of"),
        (('ETag: "other"',), 'entity tag "other" instead of "e"'),
        (('ETag: "e"', "Prefix-Version: 2"), "Prefix-Version 2 beside 1"),
        (('ETag: "e"', "Prefix-Digest: sha256:" + "1" * 64), "Prefix-Digest sha256:1.* beside sha256:0"),
    ],
)
def test_a_304_is_about_the_cached_answer(lines: tuple[str, ...], told: str) -> None:
    """A 304 must have the entity tag, version and digest of the cached answer, and a wrong one does not spoil it."""
    head = f"HTTP/1.1 {NOT_MODIFIED}\r\n" + "".join(f"{line}\r\n" for line in lines) + "\r\n"
    sound = b'HTTP/1.1 304 Not Modified\r\nETag: W/"e"\r\nPrefix-Version: 1\r\n\r\n'
    with hostile_server(says(answer(), head.encode(), sound)) as server, PrefixClient(server.url, timeout=60) as client:
        first = client.get("a/b")
        with pytest.raises(InvalidResponse, match=told):
            client.get("a/b")
        assert is_same(client.get("a/b"), first)  # a proxy may weaken the tag


def test_a_304_for_another_adapter_is_an_error(connect: Callable[..., Any], proxy: Meddler, server: Server) -> None:
    """A proxy that confuses two revalidations cannot make the client keep an outdated prefix."""
    client = connect(proxy.url)
    client.get("swap/a")
    with server.client() as http:
        other = http.get("/v1/tenants/swap/adapters/b/prefix?layout=stacked&expand=false").headers["etag"].encode()
        mine = http.get("/v1/tenants/swap/adapters/a/prefix?layout=stacked&expand=false").headers["etag"].encode()
    proxy.swaps = {b"/adapters/a/": b"/adapters/b/", mine: other}
    with pytest.raises(InvalidResponse, match="304 is not about"):
        client.get("swap/a")


@pytest.mark.parametrize("line", ["Prefix-Version: 2", "Prefix-Digest: sha256:" + "1" * 64])
def test_headers_that_contradict_the_body_are_an_error(line: str) -> None:
    """Headers that name another version than the body raise InvalidResponse."""
    with (
        hostile_server(says(answer(BODY, line))) as server,
        PrefixClient(server.url, timeout=60) as client,
        pytest.raises(InvalidResponse, match=line.partition(":")[0]),
    ):
        client.get("a/b")


# --- caches that hold something else ---


@pytest.mark.parametrize("reference", ["swap/a@1", "swap/a"])
def test_a_wrong_body_in_the_cache_on_disk_is_removed_and_fetched_again(
    connect: Callable[..., Any], server: Server, tmp_path: Path, reference: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A wrong body with the right entity tag, stored under this question, is removed and fetched again."""
    query = "prefix?layout=stacked&expand=false"
    with server.client() as http:
        wrong = http.get(f"/v1/tenants/swap/adapters/b@1/{query}").content
        tag = http.get(f"/v1/tenants/swap/adapters/{reference.partition('/')[2]}/{query}").headers["etag"]
    writer = connect(server.url, cache_dir=tmp_path)
    disk: DiskCache = getattr(writer, "_client", writer)._reading.disk
    disk.store(Question.of(reference, {}).key, Entry(bytearray(wrong), tag))
    (before,) = [path.read_bytes() for path in tmp_path.iterdir()]
    with PrefixClient(server.url, server.admin_key) as direct, caplog.at_level(logging.WARNING):
        assert is_same(connect(server.url, cache_dir=tmp_path).get(reference), direct.get(reference))
    assert "adapter 'b' instead of 'a'" in caplog.text
    (after,) = [path.read_bytes() for path in tmp_path.iterdir()]
    assert after != before


@pytest.fixture(scope="module")
def sharing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path]]:
    """Yields a service that shares its files, and its folder."""
    folder = tmp_path_factory.mktemp("sharing")
    with sharing_server(folder) as server:
        publish_all(server)
        yield server, folder


@pytest.fixture(params=["blocking", "async"])
def beside(
    request: pytest.FixtureRequest, sharing: tuple[Server, Path], tmp_path: Path
) -> Iterator[tuple[Any, Meddler]]:
    """Yields a client on a Unix socket with a proxy to the service."""
    server, _ = sharing
    with meddling_proxy(server.url, server.uds, tmp_path / "s") as proxy:
        if request.param == "blocking":
            with PrefixClient(server.url, server.admin_key, uds=proxy.uds) as client:
                yield client, proxy
            return
        loop = asyncio.new_event_loop()
        awaited = Awaited(AsyncPrefixClient(server.url, server.admin_key, uds=proxy.uds), loop)
        yield awaited, proxy
        awaited.close()
        loop.close()


SHARED_SWAPS = ["adapter", "tenant of latest", "version", "layers", "dtype of the same size", "stored dtype", "rank"]


@pytest.mark.parametrize("swap", SHARED_SWAPS)
def test_a_shared_file_that_holds_something_else_is_not_used(
    beside: tuple[Any, Meddler], sharing: tuple[Server, Path], swap: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The client asks for bytes instead, and raises if they are wrong too."""
    (client, proxy), (server, _) = beside, sharing
    reference, form, asked, other = SWAPS[swap]
    proxy.swaps = {asked: other}
    with pytest.raises(InvalidResponse, match="the answer is not about swap/a"):
        client.get(reference, **form)
    assert proxy.swapped == 2
    proxy.only = b"shared-file+json"
    with caplog.at_level(logging.WARNING), PrefixClient(server.url, server.admin_key, uds=server.uds) as direct:
        assert is_same(client.get(reference, **form), direct.get(reference, **form))
    assert proxy.swapped == 3
    assert "is not used" in caplog.text
