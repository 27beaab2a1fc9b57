"""In vLLM's server an adapter is a model: a request's `model` can name it, and the list of models has it."""

import asyncio
import json
import os
from datetime import datetime
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from prefix_service.client import PrefixClient
from prefix_service.client.flows import listing
from prefix_service.client.protocol import Answer
from prefix_service.client.vllm import model_list
from prefix_service.client.vllm.answers import Labelled
from prefix_service.client.vllm.composition import Composition, Version
from prefix_service.client.vllm.config import ConnectorConfig
from prefix_service.client.vllm.model import Model
from prefix_service.client.vllm.model_list import ModelList, page_of
from prefix_service.client.vllm.names import Permissions
from prefix_service.client.vllm.scheduler import SchedulerHalf
from prefix_service.client.vllm.source import Source
from prefix_service.errors import ConnectionFailed, InvalidRequest, InvalidResponse, NotFound
from tests.client.conftest import GPT2
from tests.client.vllm.behind import Behind
from tests.conftest import Publish, Server

GPT2_MODEL = Model(num_layers=4, num_kv_heads=4, head_dim=8, dtype="float32", max_length=128)


@pytest.fixture
def vllm(behind: Behind, publish: Publish) -> Behind:
    """vLLM's server, on which requests may name the adapters of two tenants."""
    publish("other", "hidden", GPT2)
    behind.serve_models()
    behind.extra["adapters"] = ["vllm/*", "more/a?c*"]
    return behind


def ask(vllm: Behind, path: str = "/v1/completions", headers: Any = None, **fields: Any) -> Any:
    """Posts a request; returns the answer."""
    return vllm.post(json.dumps(fields), path, **(headers or {}))


def reached(vllm: Behind) -> str | None:
    """Returns the adapter of the engine's last call; None if it had none."""
    extra = vllm.reached[-1].extra_args or {}
    reference: str | None = extra.get("kv_transfer_params", {}).get("prefix_adapter")
    return reference


@pytest.mark.parametrize("name", ["vllm/fits", "vllm/fits@1", "vllm/fits@latest"])
@pytest.mark.parametrize("stream", [False, True])
def test_an_adapter_is_a_model(vllm: Behind, name: str, stream: bool) -> None:
    """The engine gets the version by its digest; the answer has the requested name, the version and the digest."""
    answer = ask(vllm, model=name, prompt="Why?", stream=stream)
    assert answer.status_code == 200
    digest = answer.headers["prefix-digest"]
    assert (answer.headers["prefix-version"], reached(vllm)) == ("1", f"vllm/fits@{digest}")
    lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: {")] if stream else [answer.text]
    chunks = [json.loads(line) for line in lines]
    assert {chunk["model"] for chunk in chunks} == {name}
    assert chunks[-1]["kv_transfer_params"] == {"prefix_adapter": f"vllm/fits@{digest}", "prefix_version": 1}
    assert all("kv_transfer_params" not in chunk for chunk in chunks[:-1])
    if not stream:
        assert int(answer.headers["content-length"]) == len(answer.content)


def test_names_that_vllm_serves_come_first(vllm: Behind, monkeypatch: pytest.MonkeyPatch) -> None:
    """Served models go first, then loaded LoRAs, LoRAs of resolvers, and adapters; no name means the base model."""
    vllm.models.base_model_paths[1].name = "vllm/fits"
    cases: list[tuple[dict[str, Any], str]]
    cases = [({"model": "vllm/fits"}, "base"), ({"model": "org/lora"}, "org/lora"), ({}, "base")]
    for fields, model in cases:
        answer = ask(vllm, **fields)
        assert (answer.json()["model"], reached(vllm)) == (model, None)
        assert "prefix-version" not in answer.headers
    vllm.models.base_model_paths[1].name = "org/base"
    vllm.models.lora_resolvers, vllm.models.resolvable = [object()], {"vllm/fits"}
    assert reached_by(vllm, model="vllm/fits") is not None  # vLLM would not ask its resolvers either
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "True")
    assert reached_by(vllm, model="vllm/fits@1") is not None
    assert reached_by(vllm, model="vllm/fits") is None


def reached_by(vllm: Behind, **fields: Any) -> str | None:
    """Posts a request that must succeed; returns the adapter that the engine got."""
    assert ask(vllm, **fields).status_code == 200
    return reached(vllm)


@pytest.mark.parametrize(
    "name", ["vllm/none", "vllm/fits@7", "vllm/fits@nope", "other/hidden", "none/none", "nosuch", "Org/Model", "a/b/c"]
)
def test_what_is_not_allowed_is_the_same_404_as_what_is_missing(vllm: Behind, name: str) -> None:
    """Every route answers with vLLM's own 404, so a caller cannot tell the two apart."""
    for path in ("/v1/completions", "/tokenize"):
        answer = ask(vllm, path, model=name)
        assert (answer.status_code, answer.json()["error"]["message"]) == (404, f"The model `{name}` does not exist.")
    assert vllm.reached == []


def test_patterns_hold_wherever_an_adapter_is_named(vllm: Behind) -> None:
    """They hold in `kv_transfer_params` and the header too, where the answer is that of a missing adapter."""
    cases: list[tuple[dict[str, Any], Any]] = [
        ({"kv_transfer_params": {"prefix_adapter": "other/hidden"}}, {}),
        ({}, {"x_prefix_adapter": "other/hidden"}),
    ]
    for fields, headers in cases:
        answer = ask(vllm, headers=headers, **fields)
        assert (answer.status_code, answer.json()["error"]["message"]) == (
            404,
            "there is no other/hidden, or this server may not read it",
        )
    vllm.extra.pop("adapters")
    assert reached_by(vllm, kv_transfer_params={"prefix_adapter": "other/hidden"}) is not None


def test_a_key_of_the_platform_without_patterns_has_no_models(vllm: Behind) -> None:
    """No adapter is listed, or accepted as a model; `prefix_adapter` and the header still name one."""
    vllm.extra.pop("adapters")
    assert ask(vllm, model="vllm/fits").status_code == 404
    assert [card["id"] for card in listed(vllm)["data"]] == ["base", "org/base", "org/lora"]
    assert vllm.post(None, "/v1/models/vllm/fits").status_code == 404
    assert reached_by(vllm, kv_transfer_params={"prefix_adapter": "vllm/fits"}) is not None
    assert ask(vllm, headers={"x_prefix_adapter": "vllm/fits"}).headers["prefix-version"] == "1"


def test_a_header_names_an_adapter(vllm: Behind) -> None:
    """The header goes with any served model, whose name the answer keeps; a malformed reference is 400."""
    answer = ask(vllm, headers={"x_prefix_adapter": "vllm/fits"}, model="org/base")
    assert (answer.json()["model"], answer.headers["prefix-version"]) == ("base", "1")
    assert reached(vllm) == f"vllm/fits@{answer.headers['prefix-digest']}"
    refused = ask(vllm, headers={"x_prefix_adapter": "fits"})
    assert (refused.status_code, "names no tenant" in refused.text) == (400, True)
    assert ask(vllm, headers={"prefix_adapter": "vllm/fits"}).status_code == 400  # vLLM and we would ignore it


def test_a_request_names_one_adapter(vllm: Behind) -> None:
    """Several fields may name an adapter if all name the same one."""
    named: dict[str, Any] = {"kv_transfer_params": {"prefix_adapter": "vllm/fits@1"}}
    header = {"x_prefix_adapter": "vllm/fits@1"}
    assert ask(vllm, headers=header, model="vllm/fits@1", **named).json()["model"] == "vllm/fits@1"
    cases: list[tuple[dict[str, Any], Any]] = [({"model": "vllm/fits", **named}, {}), ({"model": "vllm/fits"}, header)]
    for fields, headers in cases:
        answer = ask(vllm, headers=headers, **fields)
        assert answer.status_code == 400
        assert "the request names vllm/fits in model, and vllm/fits@1 in" in answer.json()["error"]["message"]


def test_a_request_may_name_several_adapters(vllm: Behind, publish: Publish) -> None:
    """The engine gets each version in order, the answer has all in its headers and parameters, and patterns hold."""
    publish("more", "abc", GPT2)
    named = ["more/abc", "vllm/fits@1", "vllm/fits"]
    answer = ask(vllm, kv_transfer_params={"prefix_adapter": named})
    digests = answer.headers["prefix-digest"].split(", ")
    assert (answer.status_code, answer.headers["prefix-version"]) == (200, "1, 1, 1")
    handed = vllm.reached[-1].extra_args["kv_transfer_params"]["prefix_adapter"]
    assert handed == [f"{name.partition('@')[0]}@{digest}" for name, digest in zip(named, digests, strict=True)]
    told = {"prefix_adapter": handed, "prefix_version": [1, 1, 1]}
    assert answer.json()["kv_transfer_params"] == told
    streamed = ask(vllm, kv_transfer_params={"prefix_adapter": named}, stream=True).text.splitlines()
    assert json.loads(streamed[2][6:])["kv_transfer_params"] == told
    for adapters, status, words in (
        (["vllm/fits", "other/hidden"], 404, "there is no other/hidden"),
        (["vllm/fits", "vllm/none"], 404, "there is no vllm/none"),
    ):
        refused = ask(vllm, kv_transfer_params={"prefix_adapter": adapters})
        assert (refused.status_code, words in refused.json()["error"]["message"]) == (status, True), refused.text
    with pytest.raises(ValueError, match="has 640 virtual tokens: with the prompt's 0 there is no room"):
        ask(vllm, kv_transfer_params={"prefix_adapter": ["vllm/fits"] * 32})
    both = ask(vllm, model="vllm/fits", kv_transfer_params={"prefix_adapter": ["vllm/fits", "vllm/fits"]})
    assert (both.status_code, "takes a list" in both.text) == (400, True)


def test_the_default_adapter_is_that_of_requests_that_name_none(vllm: Behind) -> None:
    """It is not used for a LoRA, or on a route without adapters; a default that cannot be used is 503."""
    vllm.extra |= {"default_adapter": "other/hidden@1", "adapters": ["vllm/*"]}
    assert (reached_by(vllm) or "").startswith("other/hidden@sha256:")
    answer = ask(vllm, model="base")
    assert (answer.json()["model"], answer.headers["prefix-version"]) == ("base", "1")
    assert answer.json()["kv_transfer_params"]["prefix_adapter"].startswith("other/hidden@sha256:")
    assert (reached_by(vllm, model="org/base", kv_transfer_params={}) or "").startswith("other/hidden@sha256:")
    assert (reached_by(vllm, model="vllm/fits") or "").startswith("vllm/fits@")
    assert reached_by(vllm, model="org/lora") is None
    assert "prefix-version" not in ask(vllm, "/tokenize", model="base").headers
    vllm.extra["default_adapter"] = "vllm/none"
    answer = ask(vllm)
    assert (answer.status_code, "default_adapter cannot be used: there is no vllm/none" in answer.text) == (503, True)


def test_the_default_adapter_holds_without_the_middleware() -> None:
    """The scheduler uses it for each request that generates and has no LoRA, also in `LLM()`."""
    config = ConnectorConfig.of({"url": "http://x", "default_adapter": "acme/a"})
    half: Any = SchedulerHalf.__new__(SchedulerHalf)
    half._config = config

    def default(lora: Any, sampling: Any) -> Any:
        return half._default(SimpleNamespace(lora_request=lora, sampling_params=sampling))

    assert (default(None, object()), default(object(), object()), default(None, None)) == (("acme/a",), (), ())


def test_what_cannot_be_had_with_an_adapter_cannot_be_had_with_one_as_a_model(vllm: Behind, server: Server) -> None:
    """Other routes, options and base models get 400 with the reason, and with `model` as the field."""
    other = Behind(server.url, {"num_layers": 2, "num_kv_heads": 2, "head_dim": 2})
    other.serve_models()
    other.extra["adapters"] = ["vllm/*"]
    for answer, words in (
        (
            ask(vllm, "/tokenize", model="vllm/fits"),
            "/tokenize takes no adapter, and the request names vllm/fits in model: leave it",
        ),
        (ask(vllm, model="vllm/fits", prompt_logprobs=0), "cannot have prompt_logprobs"),
        (ask(other, model="vllm/fits"), "vllm/fits@1 has num_layers 3, the model that vLLM serves has 2"),
    ):
        told = answer.json()["error"]
        assert (answer.status_code, told["param"], told["type"]) == (400, "model", "BadRequestError")
        assert words in told["message"]


def test_without_a_connector_names_are_vllms_alone(vllm: Behind) -> None:
    """Without a connector neither the list of models nor the 404 changes."""
    vllm.state.engine_client.vllm_config.kv_transfer_config = None
    assert ask(vllm, model="vllm/fits").status_code == 404
    assert ask(vllm, model="base").json()["model"] == "base"
    assert vllm.post(None, "/v1/models").json() == {"from": "vLLM"}


def listed(vllm: Behind, query: str = "") -> Any:
    """Returns the JSON of `GET /v1/models`."""
    answer = vllm.post(None, f"/v1/models{query}")
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_models_are_vllms_and_the_adapters_that_are_allowed_and_fit(
    vllm: Behind, publish: Publish, server: Server
) -> None:
    """Adapters have cards of vLLM's form, with the base model as parent."""
    for name in ("abc", "axcd", "ab", "b"):
        publish("more", name, GPT2)
    told = listed(vllm)
    assert [card["id"] for card in told["data"]] == [
        "base", "org/base", "org/lora", "more/abc", "more/axcd", "vllm/fits"
    ]  # fmt: skip
    assert (told["object"], told["has_more"]) == ("list", False)
    with PrefixClient(server.url, os.environ["PREFIX_API_KEY"]) as client:
        version = client.inspect("vllm/fits")
    card = told["data"][-1]
    assert card["root"] == f"vllm/fits@{version['digest']}"
    assert (card["parent"], card["object"], card["owned_by"]) == ("base", "model", "vllm")
    assert card["max_model_len"] == 128 - version["num_virtual_tokens"]
    assert card["created"] == int(datetime.fromisoformat(version["created"]).timestamp())
    for name in ("vllm/fits", "vllm/fits@1", "vllm/fits@latest"):
        assert vllm.post(None, f"/v1/models/{name}").json() == {**card, "id": name}
    assert vllm.post(None, "/v1/models/vllm%2Ffits").json() == card
    assert vllm.post(None, "/v1/models/org/lora").json() == {"id": "org/lora", "parent": "base"}
    for name in ("vllm/none", "other/hidden", "nosuch", "vllm/fits@7"):
        answer = vllm.post(None, f"/v1/models/{name}")
        assert (answer.status_code, answer.json()["error"]["message"]) == (404, f"The model `{name}` does not exist.")


def test_while_the_service_is_away_vllms_own_models_are_listed(vllm: Behind, monkeypatch: pytest.MonkeyPatch) -> None:
    """Routers read the list to see whether vLLM lives, so it is answered; an adapter's card is 503."""
    monkeypatch.setattr(model_list, "_PATIENCE", 0.2)
    vllm.extra |= {"url": "http://127.0.0.1:9", "timeout": 1}
    assert [card["id"] for card in listed(vllm)["data"]] == ["base", "org/base", "org/lora"]
    assert vllm.post(None, "/v1/models/vllm/fits").status_code == 503
    assert ask(vllm, model="vllm/fits").status_code == 503
    assert ask(vllm, model="base").status_code == 200


class Listed:
    """A source that lists tenants, and as many adapters of each as `counts` says."""

    def __init__(self, own: str | None, **counts: int) -> None:
        self.own, self.counts, self.asked, self.away = own, counts, 0, False

    async def tenant(self) -> str | None:
        """Returns the tenant of the key."""
        return self.own

    async def tenants(self) -> list[dict[str, Any]]:
        """Returns every tenant, as the service lists them."""
        self._ask()
        return [{"tenant": name, "adapters": count} for name, count in self.counts.items()]

    async def list_page(self, tenant: str, cursor: str | None, limit: int) -> tuple[list[dict[str, Any]], str | None]:
        """Returns a page of a tenant's adapters."""
        self._ask()
        if tenant not in self.counts:
            raise NotFound(f"there is no tenant {tenant!r}")
        first, count = int(cursor or 0), self.counts[tenant]
        end = min(first + limit, count)
        return [_item(tenant, number) for number in range(first, end)], str(end) if end < count else None

    def _ask(self) -> None:
        self.asked += 1
        if self.away:
            raise ConnectionFailed("away")


def _item(tenant: str, number: int) -> dict[str, Any]:
    name = f"a{number:05}"
    told = {"tenant": tenant, "adapter": name, "version": 1, "digest": f"sha256:{number:064x}"}
    sizes = {"num_layers": 4, "num_kv_heads": 4, "head_dim": 8 if number % 10 else 16, "num_virtual_tokens": 20}
    return {"tenant": tenant, "adapter": name, "latest": {**told, **sizes, "created": "2026-01-01T00:00:00Z"}}


def of(source: Listed, adapters: list[str] | None) -> ModelList:
    """Returns the list of models of a configuration."""
    config = ConnectorConfig.of({"url": "http://x", "adapters": adapters})
    given: Any = source
    return ModelList(given, Permissions(config, given), GPT2_MODEL, "base")


async def test_five_thousand_adapters_are_listed_and_paged() -> None:
    """One answer has all, as the OpenAI SDK reads it, and so have pages; one adapter in ten is for another model."""
    source = Listed("acme", acme=5000, other=3)
    made = of(source, None)
    cards = await made.cards()
    assert len(cards) == 4500
    assert await made.cards() is cards
    assert source.asked == 10  # the service is asked once
    own = [{"id": "base"}]
    whole = page_of(own, cards, "")
    assert (len(whole["data"]), whole["has_more"]) == (4501, False)
    paged: list[Any] = []
    after = ""
    while True:
        page = page_of(own, cards, f"limit=1000&after={after}")
        paged += page["data"]
        if not page["has_more"]:
            break
        after = page["data"][-1]["id"]
    assert paged == whole["data"]
    assert page_of(own, cards, "limit=1&after=base")["data"] == cards[:1]
    assert page_of(own, cards, "limit=1&after=acme/a00000")["data"][0]["id"] == "acme/a00001"  # itself is not listed


@pytest.mark.parametrize("limit", ["0", "-1", "10001", "ten", "", "1e3", "\u0663"])
def test_a_page_has_a_limit_of_one_to_ten_thousand(limit: str) -> None:
    """Any other limit is refused."""
    if limit:
        with pytest.raises(InvalidRequest, match="limit must be a number from 1 to 10000"):
            page_of([], [], f"limit={limit}")
    adapters = [{"id": f"t/a{number:05}"} for number in range(10_001)]
    whole = page_of([{"id": "base"}], adapters, "")
    assert (len(whole["data"]), whole["has_more"]) == (10_001, True)


@pytest.mark.parametrize(
    ("own", "adapters", "listed"),
    [
        (None, None, []),
        ("acme", None, ["acme/a00001", "acme/a00002"]),
        ("acme", ["acme/*", "other/*"], ["acme/a00001", "acme/a00002"]),
        ("acme", ["other/*"], []),
        (None, ["acme/a00001", "gone/*"], ["acme/a00001"]),
        (None, ["*/a00001"], ["acme/a00001", "other/a00001"]),
        (None, ["o*/*"], ["other/a00001", "other/a00002"]),
        (None, [], []),
    ],
)
async def test_the_key_and_the_patterns_say_whose_adapters_are_listed(
    own: str | None, adapters: list[str] | None, listed: list[str]
) -> None:
    """A tenant's key lists its own adapters, a platform's key those of the patterns, and none without patterns."""
    cards = await of(Listed(own, acme=3, other=3), adapters).cards()
    assert [card["id"] for card in cards] == listed


async def test_while_the_service_does_not_answer_the_last_list_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error, or an answer that cannot be read, leaves the last list, and the service is asked again later."""
    monkeypatch.setattr(model_list, "_FRESH", 0.0)
    monkeypatch.setattr(model_list, "_TIMES_READ", 0)
    source = Listed("acme", acme=2)
    made = of(source, None)
    cards = await made.cards()
    source.away = True
    assert await made.cards() == cards
    source.away, source.counts["acme"] = False, 3
    assert len(await made.cards()) == 2
    monkeypatch.setitem(globals(), "_item", lambda tenant, number: {"adapter": "a", "latest": {"tenant": 1}})
    assert len(await made.cards()) == 2
    await made.close()


async def test_as_many_adapters_are_listed_as_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters above the limit are not listed."""
    monkeypatch.setattr(model_list, "_MOST_KEPT", 3)
    assert len(await of(Listed("acme", acme=9), None).cards()) == 3


async def test_an_adapter_that_leaves_no_room_for_an_answer_is_not_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 128 tokens, 126 leave room for a prompt of one and an answer of one."""
    items = {number: _item("a", number) for number in (1, 2, 3)}
    for number, item in items.items():
        item["latest"]["num_virtual_tokens"] = {1: 126, 2: 127, 3: 500}[number]
    source = Listed("a", a=4)
    monkeypatch.setattr("tests.client.vllm.test_model_names._item", lambda _, number: items[max(1, number)])
    assert {(card["id"], card["max_model_len"]) for card in await of(source, None).cards()} == {("a/a00001", 2)}


async def test_a_list_that_is_being_read_is_given_up_at_the_end() -> None:
    """Closing does not wait for a service that hangs."""

    class Hanging(Listed):
        async def list_page(self, *_asked: Any) -> Any:
            await asyncio.sleep(60)

    made = of(Hanging("acme"), None)
    waiting = asyncio.create_task(made.cards())
    await asyncio.sleep(0.01)
    await made.close()
    assert await waiting == []


@pytest.mark.parametrize(
    "page", [{"items": [{}] * 3, "next": None}, {"items": [], "next": "same"}, {"items": [], "next": 7}]
)
def test_a_page_of_adapters_that_cannot_be_is_an_error(page: dict[str, Any]) -> None:
    """Refused are more items than requested, and a cursor that is the current one, or no text."""
    flow = listing.adapters_page("acme", "same", 2)
    request: Any = next(flow)
    assert request.params == {"limit": "2", "cursor": "same"}
    with pytest.raises(InvalidResponse, match="/v1/tenants/acme/adapters sent"):
        flow.send(Answer(200, {"content-type": "application/json"}, bytearray(json.dumps(page).encode())))


async def test_a_key_is_asked_about_once_for_all_and_again_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """All callers share one question, also its failure; a service without that route has no tenant for any key."""
    source, asked = Source(ConnectorConfig.of({"url": "http://x"})), 0
    answer: Any = ConnectionFailed("away")

    async def run(_ask: Any) -> Any:
        nonlocal asked
        asked += 1
        await asyncio.sleep(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(source, "_call", run)
    results = await asyncio.gather(source.tenant(), source.tenant(), return_exceptions=True)
    assert list(results) == [answer, answer]
    assert asked == 1
    answer = {"tenant": 7}
    with pytest.raises(InvalidResponse, match="got 7"):
        await source.tenant()
    answer = {"tenant": "acme"}
    assert [await source.tenant() for _ in range(3)] == ["acme"] * 3
    assert asked == 3
    await source.close()
    old, answer = Source(ConnectorConfig.of({"url": "http://x"})), NotFound("no such path")
    monkeypatch.setattr(old, "_call", run)
    assert await old.tenant() is None
    await old.close()


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"adapters": ["acme"]}, "'acme' is not of the form tenant/adapter, in which"),
        ({"adapters": ["acme/[ab]"]}, "is not of the form tenant/adapter"),
        ({"default_adapter": "acme"}, "names no tenant"),
    ],
)
def test_a_pattern_or_a_default_that_names_nothing_is_refused(extra: dict[str, Any], words: str) -> None:
    """A malformed pattern or default is refused when vLLM starts."""
    with pytest.raises(InvalidRequest, match=r"kv_connector_extra_config: ") as refused:
        ConnectorConfig.of({"url": "http://x", **extra})
    assert words in str(refused.value)


COMPOSITION = Composition((Version("acme", "a", 3, "sha256:" + "0" * 64, 20),))


async def _labelled(content_type: str, *bodies: bytes) -> tuple[dict[bytes, bytes], list[bytes]]:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    answer = Labelled(send, COMPOSITION)
    headers = [(b"Content-Type", content_type.encode()), (b"Content-Length", b"1")]
    await answer({"type": "http.response.start", "status": 200, "headers": headers})
    for number, body in enumerate(bodies, 1):
        await answer({"type": "http.response.body", "body": body, "more_body": number < len(bodies)})
    assert [message["type"] for message in sent] == ["http.response.start", *["http.response.body"] * len(bodies)]
    return dict(sent[0]["headers"]), [message["body"] for message in sent[1:]]


async def test_the_last_chunk_of_each_kind_of_stream_has_the_version() -> None:
    """The last chunks of chat, completions, usage and messages have it; other chunks are unchanged."""
    last = [
        b'data: {"choices":[{"delta":{},"finish_reason":"stop"}]}\n\n',
        b'data: {"choices":[],"usage":{"total_tokens":3}}\n\n',
        b'event: message_stop\ndata: {"type":"message_stop"}\n\n',
    ]
    others = [
        b'data: {"choices":[{"delta":{"content":"\\"finish_reason\\":\\"stop"},"finish_reason":null}]}\n\n',
        b'data: {"choices":[],"kv_transfer_params":{"prefix_version":3}}\n\n',
        b"data: [DONE]\n\n",
        b": keep-alive\n\n",
    ]
    headers, bodies = await _labelled("text/event-stream; charset=utf-8", *last, *others)
    assert (headers[b"prefix-version"], headers[b"prefix-digest"]) == (b"3", COMPOSITION.versions[0].digest.encode())
    for before, after in zip(last, bodies, strict=False):
        told = json.loads(after.partition(b"data: ")[2])
        assert told.pop("kv_transfer_params") == {
            "prefix_adapter": COMPOSITION.versions[0].reference,
            "prefix_version": 3,
        }
        assert told == json.loads(before.partition(b"data: ")[2])
        assert after.endswith(b"}\n\n")
    assert bodies[len(last) :] == others
    _, whole = await _labelled("text/event-stream", last[0] + others[2])
    assert whole[0].count(b"prefix_version") == 1
    assert whole[0].endswith(b"data: [DONE]\n\n")


async def test_a_json_answer_has_the_version_where_vllm_left_it_out() -> None:
    """An answer that has the field already, or that comes in pieces, is unchanged."""
    headers, (body,) = await _labelled("application/json", b'{"a":1,"kv_transfer_params":null}')
    assert json.loads(body) == {
        "a": 1, "kv_transfer_params": {"prefix_adapter": COMPOSITION.versions[0].reference, "prefix_version": 3}
    }  # fmt: skip
    assert int(headers[b"Content-Length"]) == len(body)
    for bodies in ([b'{"kv_transfer_params":{}}'], [b'{"kv_transfer_params":', b"null}"], [b""]):
        headers, sent = await _labelled("application/json", *bodies)
        assert (sent, headers[b"prefix-version"]) == (bodies, b"3")


def test_a_key_of_a_tenant_has_its_own_adapters_as_models(
    behind: Behind, publish: Publish, admin: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without patterns a tenant's key lists and accepts its own adapters, and no other tenant's."""
    publish("other", "hidden", GPT2)
    behind.serve_models()
    key = admin.post("/v1/tenants/vllm/keys", json={"scope": "read"}).json()["key"]
    monkeypatch.setenv("PREFIX_API_KEY", key)
    assert [card["id"] for card in listed(behind)["data"]] == ["base", "org/base", "org/lora", "vllm/fits"]
    for name, status in (("vllm/fits", 200), ("other/hidden", 404)):
        assert ask(behind, model=name).status_code == status
        assert behind.post(None, f"/v1/models/{name}").status_code == status
