"""Arguments of both clients: the same of both, shown by `help()`, and refused before a request if they are wrong."""

import asyncio
import inspect
import io
import pickle
import pydoc
import re
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest

from prefix_service.client import AsyncPrefixClient, Fingerprint, PrefixClient
from prefix_service.errors import InvalidInput, InvalidRequest
from tests.client.conftest import LLAMA
from tests.client.hostile import answer, hostile_server, says

CALLS: dict[str, tuple[Any, ...]] = {
    "get": ("a/b@1",),
    "get_many": (["a/b@1"],),
    "prefetch": (["a/b@1"],),
    "resolve": ("a/b",),
    "publish": ("a/b", LLAMA),
    "publish_files": ("a/b", b"{}", io.BytesIO(b"")),
    "compose": ("a/b", ["a/c"]),
    "inspect": ("a/b",),
    "float8_error": ("a/b",),
    "list": ("a",),
    "is_ready": (),
    "versions": ("a/b",),
    "delete": ("a/b",),
    "aliases": ("a/b",),
    "put_alias": ("a/b", "prod", 1),
    "delete_alias": ("a/b", "prod"),
    "rollback": ("a/b", "prod"),
    "parameters": ("a/b", 0, 1),
    "load": ("a/b",),
    "unload": ("a/b",),
    "residency": (),
    "tenants": (),
    "tenant": ("a",),
    "put_tenant": ("a",),
    "delete_tenant": ("a",),
    "audit": (),
    "whoami": (),
    "keys": (),
    "key": ("0" * 16,),
    "create_key": ("read",),
    "shorten_key": ("0" * 16, datetime(2100, 1, 1, tzinfo=UTC)),
    "revoke_key": ("0" * 16,),
    "card": ("a/b",),
    "put_card": ("a/b", "text"),
    "annotations": ("a/b",),
    "put_annotations": ("a/b", {}),
    "usage": (),
    "list_page": ("a",),
    "base_model": ("a/b",),
    "put_base_model": ("a/b", Fingerprint()),
    "config_file": ("a/b",),
    "service": (),
}


def parameters(of: Any) -> list[tuple[str, Any, Any]]:
    """Names, kinds and defaults, without the first."""
    found = list(inspect.signature(of).parameters.values())[1:]
    return [(each.name, each.kind, each.default) for each in found]


def outcome(client: Any, name: str, *args: Any, **options: Any) -> Any:
    """What a call returns, of a client of either kind."""
    made = getattr(client, name)(*args, **options)
    return asyncio.run(made) if inspect.iscoroutine(made) else made


@pytest.mark.parametrize("name", ["__init__", *CALLS])
def test_both_clients_take_the_same_arguments(name: str) -> None:
    """Each is named: none hides behind `**options`."""
    ours, theirs = (parameters(getattr(kind, name)) for kind in (PrefixClient, AsyncPrefixClient))
    assert ours == theirs
    assert not [each for each in ours if each[1] in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)]
    assert not inspect.iscoroutinefunction(getattr(PrefixClient, name))
    assert inspect.iscoroutinefunction(getattr(AsyncPrefixClient, name)) == (name != "__init__")


@pytest.mark.parametrize("kind", [PrefixClient, AsyncPrefixClient])
def test_help_shows_options_and_results(kind: type[Any]) -> None:
    """Each method is shown under its name, with its options and with what it returns; a flow is seen by nobody."""
    shown = pydoc.plain(pydoc.render_doc(kind))
    for name in CALLS:
        assert re.search(rf"^ \|  (async )?{name}\(", shown, re.MULTILINE), name
    assert not re.search(r"Flow\b|Caller|\bargs\b", shown)
    assert re.search(r"\bget\([^)]*batch_size: int = 1,[^)]*materialise: bool = False", shown)
    signature = inspect.signature(kind.get)
    assert signature.return_annotation == "Prefix"
    assert signature.parameters["materialise"].default is False
    assert inspect.signature(kind.aliases).return_annotation == dict[str, int]
    assert list(inspect.signature(kind("http://service").aliases).parameters) == ["adapter"]


@pytest.mark.parametrize("kind", [PrefixClient, AsyncPrefixClient])
def test_a_method_can_be_pickled(kind: type[Any]) -> None:
    """It travels with its client, as a pool of processes needs it."""
    for name in CALLS:
        method = pickle.loads(pickle.dumps(getattr(kind("http://service"), name)))  # noqa: S301 - of this test
        assert method.__name__ == name
        assert method.__self__.__class__ is kind


@pytest.mark.parametrize("kind", [PrefixClient, AsyncPrefixClient])
def test_an_unknown_argument_is_a_type_error(kind: type[Any]) -> None:
    """Of the constructor, and of every method, before anything is sent."""
    with hostile_server(says(answer())) as server:
        for wrong in ({"tiemout": 3}, {"key": "k"}):
            with pytest.raises(TypeError, match=next(iter(wrong))):
                kind(server.url, **wrong)
        client = kind(server.url)
        for name, args in CALLS.items():
            with pytest.raises(TypeError, match="batchsize"):
                outcome(client, name, *args, batchsize=4)
        assert server.requests == []
        outcome(client, "close")


@pytest.mark.parametrize("kind", [PrefixClient, AsyncPrefixClient])
@pytest.mark.parametrize(
    "wrong",
    [
        {"timeout": -1},
        {"timeout": 0},
        {"timeout": "3"},
        {"timeout": float("nan")},
        {"timeout": float("inf")},
        {"connections": 0},
        {"connections": True},
        {"cache_bytes": -1},
        {"cache_bytes": 1.5},
        {"cache_dir_bytes": "10"},
        {"cache_dir": 7},
        {"uds": 7},
        {"ca_file": "/nowhere.pem"},
        {"ca_file": b"x"},
        {"verify_digest": "yes"},
        {"pin_memory": 1},
        {"shared_memory": "no"},
        {"http": "http://proxy"},
    ],
    ids=str,
)
def test_an_option_of_the_constructor_that_is_wrong_is_named(kind: type[Any], wrong: dict[str, Any]) -> None:
    """Whatever its type or value."""
    with pytest.raises(InvalidRequest, match=next(iter(wrong))):
        kind("https://service" if "ca_file" in wrong else "http://service", **wrong)


@pytest.mark.parametrize(
    ("url", "key", "message"),
    [
        ("http://localhost:84278", None, "port 84278"),
        ("http://localhost:0", None, "port 0"),
        (b"http://service", None, "must be a str, got bytes"),
        ("http://service", b"pfx_1", "API key must be a str, got bytes"),
        ("http://service", 5, "API key must be a str, got int"),
    ],
)
def test_an_address_or_key_that_cannot_be_is_named(url: Any, key: Any, message: str) -> None:
    """A port above 65535 would wrap to another service's, and the key would go there."""
    with pytest.raises(InvalidRequest, match=message):
        PrefixClient(url, key)


def test_a_transport_of_the_other_kind_is_refused() -> None:
    """A blocking client cannot await, and the other way round."""
    with pytest.raises(InvalidRequest, match="http"):
        PrefixClient("http://service", http=httpx.AsyncHTTPTransport())
    with httpx.HTTPTransport() as blocking, pytest.raises(InvalidRequest, match="http"):
        AsyncPrefixClient("http://service", http=blocking)


WRONG_FORMS: list[dict[str, Any]] = [
    {"dtype": "int8"},
    {"dtype": ["float32"]},
    {"dtype": 1},
    {"layers": 3},
    {"layers": (0,)},
    {"layers": (2, 1)},
    {"layers": ("0", "1")},
    {"kv_heads": (-1, 1)},
    {"tp": (2, 2)},
    {"tp": "0/2"},
    {"pp": (1, 1)},
    {"pp": (1.0, 2.0)},
]


@pytest.mark.parametrize("kind", [PrefixClient, AsyncPrefixClient])
def test_an_option_of_a_method_that_is_wrong_is_named_before_a_request(kind: type[Any]) -> None:
    """Of each method that takes it."""
    cases = [(name, wrong) for name in ("get", "get_many", "prefetch") for wrong in WRONG_FORMS]
    cases += [("get", {"batch_size": value}) for value in ("4", 0, -1, 1.5, None, True)]
    cases += [("get", {"materialise": "yes"}), ("get_many", {"batch_size": 2})]
    cases += [("prefetch", {"concurrency": value}) for value in (0, "2", None)]
    cases += [("list", {"limit": value}) for value in (0, "2", True)]
    cases += [("list_page", {"limit": value}) for value in (0, "2", True)]
    cases += [(name, {"progress": 1}) for name in ("get", "publish")]
    cases += [("publish", {"base_model_config": 1})]
    with hostile_server(says(answer())) as server:
        client = kind(server.url)
        for name, wrong in cases:
            with pytest.raises(InvalidRequest, match=next(iter(wrong))):
                outcome(client, name, *CALLS[name], **wrong)
        for value in (5, None, b"a/b", ["a/b"]):
            with pytest.raises(InvalidInput):
                outcome(client, "get", value)
            with pytest.raises(InvalidInput):
                outcome(client, "inspect", value)
        with pytest.raises(InvalidInput):
            outcome(client, "publish_files", "a/b", "{}", io.BytesIO(b""))
        with pytest.raises(InvalidInput):
            outcome(client, "publish_files", "a/b", b"{}", io.StringIO(""))
        with pytest.raises(InvalidInput, match="weights must be a file"):
            outcome(client, "publish_files", "a/b", b"{}", "adapter_model.safetensors")
        for given in ({"tokenizer": "x"}, None, Fingerprint(tokenizer=""), Fingerprint(sizes={"x": {1}})):
            with pytest.raises(InvalidInput, match=r"fingerprint|tokenizer"):
                outcome(client, "put_base_model", "a/b", given)
        for folder in (None, b"folder", 7):
            with pytest.raises(InvalidInput, match="folder must be a path"):
                outcome(client, "publish", "a/b", folder)
        for name, before in (("prefetch", ()), ("get_many", ()), ("compose", ("a/b",))):
            with pytest.raises(InvalidInput, match="must be a list"):
                outcome(client, name, *before, "a/b")
        assert server.requests == []
        outcome(client, "close")


def test_a_prefix_is_shown_on_one_line() -> None:
    """Which one it is, its sizes and where its tensors are, but not their numbers."""
    with hostile_server(says(answer())) as server, PrefixClient(server.url) as client:
        shown = repr(client.get("a/b@1", batch_size=4))
    assert shown == "<Prefix a/b@1: 4 x 20 tokens, 3 layers, 2 heads of 8, float32 on cpu>"


def test_a_batch_is_shown_on_one_line() -> None:
    """Its first rows are named, its tensors are not printed; neither are those of the keys and values."""
    with hostile_server(says(*[answer()] * 2)) as server, PrefixClient(server.url) as client:
        short = client.get_many([["a/b@1", "a/b"], None])
        long = client.get_many(["a/b@1"] * 9)
        kv = client.get("a/b@1").kv
    assert repr(short) == (
        "<MixedPrefix [a/b@1 + a/b, no prefix]: 2 x 40 tokens, 3 layers, 2 heads of 8, float32 on cpu>"
    )
    assert repr(long) == (
        "<MixedPrefix [a/b@1, a/b@1, a/b@1, …]: 9 x 20 tokens, 3 layers, 2 heads of 8, float32 on cpu>"
    )
    assert repr(kv) == "<PrefixKV [3, 2, 2, 20, 8]: layers (0, 3) of 3, heads (0, 2) of 2, float32 on cpu>"


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No URL and no key until a test sets them."""
    for name in ("PREFIX_URL", "PREFIX_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize("kind", [PrefixClient, AsyncPrefixClient])
def test_url_and_key_come_from_the_environment(kind: type[Any], environment: pytest.MonkeyPatch) -> None:
    """What is given goes first; an empty key means none."""
    with hostile_server(says(answer())) as server:

        def sent(*args: Any, **options: Any) -> bytes:
            client = kind(*args, **options)
            outcome(client, "get", "a/b")
            outcome(client, "close")
            assert "pfx_" not in repr(client)
            return server.requests[-1][0]

        environment.setenv("PREFIX_URL", server.url)
        assert b"Authorization" not in sent()
        environment.setenv("PREFIX_API_KEY", "pfx_environment")
        assert b"Authorization: Bearer pfx_environment\r\n" in sent()
        assert b"Authorization: Bearer pfx_given\r\n" in sent(api_key="pfx_given")
        assert b"Authorization" not in sent(api_key="")
        environment.setenv("PREFIX_URL", "http://127.0.0.1:1")
        assert b"Authorization: Bearer pfx_environment\r\n" in sent(server.url)
        environment.setenv("PREFIX_API_KEY", "")
        assert b"Authorization" not in sent(server.url)


@pytest.mark.parametrize("kind", [PrefixClient, AsyncPrefixClient])
def test_without_a_url_the_client_asks_where_serve_listens(kind: type[Any], environment: pytest.MonkeyPatch) -> None:
    """Also where the variable is empty; beside a Unix socket the environment's URL is not looked at."""
    assert repr(kind()) == f"{kind.__name__}('http://127.0.0.1:8080')"
    environment.setenv("PREFIX_URL", "")
    assert repr(kind()) == f"{kind.__name__}('http://127.0.0.1:8080')"
    environment.setenv("PREFIX_URL", "https://elsewhere")
    with hostile_server(says(answer()), uds=True) as server:
        client = kind(uds=server.uds)
        assert outcome(client, "get", "a/b").version == 1
        outcome(client, "close")


@pytest.mark.parametrize("kind", [PrefixClient, AsyncPrefixClient])
def test_a_pickled_client_needs_no_environment(kind: type[Any], environment: pytest.MonkeyPatch) -> None:
    """It carries the URL and the key that it was made with, and takes no other key where it is made again."""
    with hostile_server(says(answer())) as server:
        environment.setenv("PREFIX_URL", server.url)
        without = pickle.dumps(kind())
        environment.setenv("PREFIX_API_KEY", "pfx_here")
        carried = pickle.dumps(kind(timeout=None))
        environment.setenv("PREFIX_URL", "http://127.0.0.1:1")
        environment.setenv("PREFIX_API_KEY", "pfx_there")
        for pickled, key in ((carried, b"pfx_here"), (without, None)):
            client = pickle.loads(pickled)  # noqa: S301 - of this test
            outcome(client, "get", "a/b")
            outcome(client, "close")
            found = re.search(rb"Authorization: Bearer (\S+)", server.requests[-1][0])
            assert (None if found is None else found[1]) == key


@pytest.mark.parametrize("kind", [PrefixClient, AsyncPrefixClient])
def test_a_closed_client_says_so(kind: type[Any]) -> None:
    """It makes no request, and raises no error of a library."""
    client = kind("http://127.0.0.1:1", timeout=1)
    outcome(client, "close")
    for name, args in CALLS.items():
        with pytest.raises(InvalidRequest, match="closed"):
            outcome(client, name, *args)
