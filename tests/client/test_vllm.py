"""The parts of the vLLM connector that need no vLLM: words for what is refused, ranks, salts, and the middleware."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

import service.client.vllm as connector
from service.client import PrefixClient
from service.client.vllm.config import ConnectorConfig
from service.client.vllm.middleware import PrefixMiddleware
from service.client.vllm.model import Model, refuse_model
from service.client.vllm.requests import adapter_of, refuse_unservable
from service.client.vllm.salt import Salts
from service.client.vllm.versions import check_version
from service.errors import DimensionMismatch, InvalidReference, InvalidRequest
from tests.client.conftest import GPT2
from tests.conftest import Publish, Server

GPT2_MODEL = Model(num_layers=4, num_kv_heads=4, head_dim=8, dtype="float32", max_length=128)


def test_without_vllm_the_connector_says_what_to_install() -> None:
    """The package itself can be imported, its other names are none."""
    hidden = "import sys; sys.modules['vllm'] = None; from service.client.vllm import PrefixConnector"
    done = subprocess.run([sys.executable, "-c", hidden], check=False, capture_output=True, text=True)
    assert "ImportError: service.client.vllm needs vLLM 0.32, and none is installed: pip install" in done.stderr
    with pytest.raises(AttributeError, match="nothing"):
        _ = connector.nothing
    assert connector.PrefixMiddleware is PrefixMiddleware


@pytest.mark.parametrize("version", ["0.31.1", "0.33.0", "0.3.2", "1.0"])
def test_another_version_of_vllm_is_refused_by_name(version: str) -> None:
    """Patches of the version that this was built for are taken."""
    check_version("0.32.1")
    with pytest.raises(ImportError, match=f"installed is {version}"):
        check_version(version)


@pytest.mark.parametrize(
    ("given_", "words"),
    [
        ({}, "url: Field required"),
        ({"url": "http://x", "adress": 1}, "adress: Extra inputs are not permitted. It may have: url, api_key_file"),
        ({"url": "http://x", "api_key": "secret"}, "vLLM writes its configuration to its log"),
        ({"url": "http://x", "timeout": "soon"}, "timeout: Input should be a valid number"),
    ],
)
def test_a_wrong_configuration_is_refused_with_words(given_: dict[str, Any], words: str) -> None:
    """What is wrong, and what there may be; never the key."""
    with pytest.raises(InvalidRequest) as refused:
        ConnectorConfig.of(given_)
    assert words in str(refused.value)
    assert "secret" not in str(refused.value)


def test_the_key_comes_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file first; a file that is not there is told."""
    file = tmp_path / "key"
    file.write_text("from-file\n")
    monkeypatch.setenv("OTHER", "from-environment")
    monkeypatch.delenv("PREFIX_API_KEY", raising=False)
    for more, key in (
        ({"api_key_file": file}, "from-file"),
        ({"api_key_env": "OTHER"}, "from-environment"),
        ({}, None),
    ):
        with ConnectorConfig.of({"url": "http://x", **more}).client() as client:
            assert client._connection.api_key == key
    with pytest.raises(InvalidRequest, match="cannot be read"):
        ConnectorConfig.of({"url": "http://x", "api_key_file": tmp_path / "none"}).client()


def test_a_request_names_its_adapter_or_none() -> None:
    """Parameters of other connectors are none of ours."""
    assert adapter_of(None) is None
    assert adapter_of({"do_remote_prefill": True}) is None
    assert adapter_of({"prefix_adapter": "acme/a@prod"}) == "acme/a@prod"


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda one: st.lists(one)))
def test_whatever_a_request_sends_is_a_reference_or_an_error_of_ours(sent: Any) -> None:
    """Another exception in vLLM's scheduler would end the engine for everybody."""
    for params in (sent, {"prefix_adapter": sent}):
        with suppress(InvalidReference, InvalidRequest):
            adapter_of(params)


_PLAIN = {
    "sampling_params": SimpleNamespace(prompt_logprobs=None),
    "skip_reading_prefix_cache": False,
    "prompt_token_ids": [1],
    "prompt_is_token_ids": None,
    "mm_features": [],
    "resumable": False,
}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sampling_params": None}, "pooling"),
        ({"sampling_params": SimpleNamespace(prompt_logprobs=0)}, "prompt_logprobs"),
        ({"skip_reading_prefix_cache": True}, "skip_reading_prefix_cache"),
        ({"prompt_token_ids": None}, "prompt embeddings"),
        ({"mm_features": [1]}, "images"),
        ({"resumable": True}, "in pieces"),
    ],
)
def test_what_vllm_cannot_do_behind_a_prefix_is_refused(change: dict[str, Any], words: str) -> None:
    """One by one."""
    refuse_unservable(SimpleNamespace(**_PLAIN))
    with pytest.raises(InvalidRequest, match=words):
        refuse_unservable(SimpleNamespace(**{**_PLAIN, **change}))


class FullAttentionSpec:
    """Named as vLLM's."""

    def __init__(self, sliding_window: int | None = None) -> None:
        self.sliding_window = sliding_window


def _engine(**change: Any) -> tuple[Any, Any]:
    one = {"policy": "fail", "mla": False, "groups": [FullAttentionSpec()], "context": 1, "draft": None, **change}
    config = SimpleNamespace(
        kv_transfer_config=SimpleNamespace(kv_load_failure_policy=one["policy"]),
        parallel_config=SimpleNamespace(decode_context_parallel_size=one["context"]),
        model_config=SimpleNamespace(use_mla=one["mla"]),
        speculative_config=one["draft"],
    )
    return config, SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec) for spec in one["groups"]])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"policy": "recompute"}, "garbage"),
        ({"mla": True}, "MLA"),
        ({"groups": [FullAttentionSpec(), FullAttentionSpec()]}, "sliding windows"),
        ({"groups": [FullAttentionSpec(4096)]}, "sliding windows"),
        ({"groups": [SimpleNamespace(sliding_window=None)]}, "state spaces"),
        ({"context": 2}, "context parallelism"),
        ({"draft": SimpleNamespace(method="eagle")}, "draft"),
    ],
)
def test_an_engine_in_which_prefixes_would_be_wrong_does_not_start(change: dict[str, Any], words: str) -> None:
    """With the reason."""
    refuse_model(*_engine())
    refuse_model(*_engine(draft=SimpleNamespace(method="ngram")))
    with pytest.raises(InvalidRequest, match=words):
        refuse_model(*_engine(**change))


def test_a_prefix_of_another_model_is_refused() -> None:
    """The first size that differs is named."""
    told = {"tenant": "acme", "adapter": "a", "version": 1, "num_layers": 4, "num_kv_heads": 4, "head_dim": 8}
    GPT2_MODEL.check(told)
    for name in ("num_layers", "num_kv_heads", "head_dim"):
        with pytest.raises(DimensionMismatch, match=rf"acme/a@1 has {name} 3, the model that vLLM serves has"):
            GPT2_MODEL.check({**told, name: 3})


@given(st.lists(st.tuples(*[st.text(max_size=3)] * 3, st.none() | st.text(max_size=3)), unique=True, max_size=8))
def test_salts_differ_where_anything_differs(named: list[tuple[str, str, str, str | None]]) -> None:
    """Within a process they are stable, in another they are others."""
    salts = Salts()
    made = [salts.of(*one) for one in named]
    assert len(set(made)) == len(named)
    assert made == [salts.of(*one) for one in named]
    assert not set(made) & {Salts().of(*one) for one in named}


class Behind:
    """An application that answers with what it was sent, as vLLM's has its state."""

    def __init__(self, url: str, model: dict[str, Any], *, transfers: bool = True) -> None:
        transfer = SimpleNamespace(kv_connector_extra_config={"url": url, "timeout": 2}) if transfers else None
        config = SimpleNamespace(
            kv_transfer_config=transfer,
            model_config=SimpleNamespace(
                get_total_num_hidden_layers=lambda: model["num_layers"],
                get_total_num_kv_heads=lambda: model["num_kv_heads"],
                get_head_size=lambda: model["head_dim"],
                dtype="torch.float32",
                max_model_len=128,
            ),
        )
        self.state = SimpleNamespace(engine_client=SimpleNamespace(vllm_config=config))

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        scope["app"] = self
        await self.made(scope, receive, send)

    async def _echo(self, scope: Any, receive: Callable[[], Awaitable[Any]], send: Any) -> None:
        if scope["type"] == "lifespan":
            return
        body, more = b"", scope["method"] == "POST"
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})

    def post(self, content: Any) -> httpx.Response:
        """What it answers, in a life of its own."""

        self.made = PrefixMiddleware(self._echo)

        async def ask() -> httpx.Response:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(self), base_url="http://vllm") as client:
                return await client.request(
                    "POST" if content is not None else "GET", "/v1/completions", content=content
                )

        async def live() -> httpx.Response:
            try:
                return await ask()
            finally:
                await self({"type": "lifespan"}, None, None)

        return asyncio.run(live())


@pytest.fixture
def behind(server: Server, publish: Publish, monkeypatch: pytest.MonkeyPatch) -> Behind:
    """Behind the middleware, with an adapter that fits."""
    publish("vllm", "fits", GPT2)
    monkeypatch.setenv("PREFIX_API_KEY", server.admin_key)
    with PrefixClient(server.url, server.admin_key) as client:
        return Behind(server.url, dict(client.get("vllm/fits").metadata))


def test_the_middleware_lets_through_what_is_right_as_it_came(behind: Behind) -> None:
    """An adapter that is there and fits; no adapter; other JSON; no JSON; no body."""
    adapter = {"kv_transfer_params": {"prefix_adapter": "vllm/fits@1"}, "prompt": "ü"}
    for content in (json.dumps(adapter), '{"prompt": "\\u00fc"}', '["prefix_adapter"]', "{prefix_adapter", "", None):
        answer = behind.post(content)
        assert (answer.status_code, answer.content) == (200, (content or "").encode())


@pytest.mark.parametrize(
    ("params", "more", "status", "words"),
    [
        ({"prefix_adapter": "vllm/none"}, {}, 404, "there is no vllm/none"),
        ({"prefix_adapter": 7}, {}, 400, "got 7"),
        (["prefix_adapter"], {}, 400, "must be an object"),
        ({"prefix_adapter": "vllm/fits"}, {"prompt_logprobs": 0}, 400, "prompt_logprobs"),
        ({"prefix_adapter": "vllm/fits"}, {"echo": True, "logprobs": 1}, 400, "echo"),
    ],
)
def test_the_middleware_tells_what_is_wrong(
    behind: Behind, params: Any, more: dict[str, Any], status: int, words: str
) -> None:
    """In the form of vLLM's own errors."""
    answer = behind.post(json.dumps({"kv_transfer_params": params, **more}))
    told = answer.json()["error"]
    assert (answer.status_code, told["code"], told["param"]) == (status, status, "kv_transfer_params.prefix_adapter")
    assert words in told["message"]


def test_the_middleware_tells_of_a_wrong_model_a_wrong_engine_and_a_service_that_is_away(
    behind: Behind, server: Server
) -> None:
    """400 for what the caller or the operator must change, 503 for what passes."""
    content = json.dumps({"kv_transfer_params": {"prefix_adapter": "vllm/fits"}})
    other = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 2}
    for app, status, words in (
        (Behind(server.url, other), 400, "trained for another model"),
        (Behind(server.url, other, transfers=False), 400, "without PrefixConnector"),
        (Behind("http://127.0.0.1:9", other), 503, "cannot be reached"),
    ):
        answer = app.post(content)
        assert answer.status_code == status
        assert words in answer.json()["error"]["message"]
