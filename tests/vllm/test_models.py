"""Adapters and a LoRA are models of vLLM's OpenAI-compatible server, and say what PEFT says, in one batch."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.benchmarks.growth.folder import BIG, name_of
from tests.processes import eventually
from tests.vllm.sdks import called
from tests.vllm.served import ASKED, KEY, LORA, MANY, ROWS, SDK_ROWS, Served, adapter_of, without_lora

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers' own


def test_a_batch_of_adapters_a_lora_both_and_neither_is_peft_s_token_for_token(served: Served) -> None:
    """Rows of adapters, a LoRA, a LoRA behind an adapter, and the plain model are answered together, twice: the second
    time from vLLM's prefix cache. Ids are compared, and the texts that the SDKs are compared with.
    """

    def ask(asked: dict[str, Any]) -> httpx.Response:
        body = {"model": asked["model"], "prompt": asked["prompt"], "temperature": 0, "max_tokens": 24}
        headers = {} if asked["header"] is None else {"X-Prefix-Adapter": asked["header"]}
        return served.client.post("/v1/completions", json={**body, "return_token_ids": True}, headers=headers)

    by_lora = [asked for asked in ROWS if asked["model"] == LORA]
    assert all(served.said(asked) != without_lora(asked) for asked in by_lora)
    for _ in range(2):
        with ThreadPoolExecutor(len(ROWS)) as threads:
            answers = list(threads.map(ask, ROWS))
        for asked, answer in zip(ROWS, answers, strict=True):
            assert answer.status_code == 200, (asked, answer.text)
            choice, (ids, text) = answer.json()["choices"][0], served.said(asked)
            assert (choice["token_ids"], choice["text"].strip()) == (ids, text.strip()), asked
            has_adapter = adapter_of(asked) is not None
            assert (answer.json()["model"], "prefix-version" in answer.headers) == (asked["model"], has_adapter)


@pytest.mark.parametrize("sdk", ["openai", "litellm", "anthropic"])
def test_an_sdk_gets_what_peft_says(served: Served, sdk: str) -> None:
    """Rows of three adapters, one of them named by the header, of the plain model, and of a LoRA with and without an
    adapter are answered together, streamed and not, on each of the SDK's routes. The answer has the requested name, the
    version and the digest.
    """
    answered = called(served.client, KEY, sdk, SDK_ROWS)
    for asked, answer in zip(SDK_ROWS, answered["rows"], strict=True):
        adapter = adapter_of(asked)
        version, digest = answer.pop("headers", (None, None))
        assert (version, digest is not None) == (("1", True) if sdk == "openai" and adapter else (None, False))
        for call, told in answer.items():
            assert told["text"].strip() == served.said(asked)[1].strip(), (sdk, call, asked)
            assert told["model"].removeprefix("hosted_vllm/") == asked["model"], (sdk, call)
            if sdk == "litellm" or adapter is None:
                assert told["parameters"] is None, (sdk, call)
            else:
                assert told["parameters"]["prefix_version"] == 1, (sdk, call)
                assert told["parameters"]["prefix_adapter"].startswith(f"{adapter}@sha256:"), (sdk, call)
    assert "does not exist" in answered["missing"]


def test_the_sdk_lists_served_models_and_thousands_of_adapters(served: Served) -> None:
    """The list has all allowed adapters, and none of another tenant; some are also read alone."""
    many = [f"{BIG}/{name}" for name in (*(name_of(number) for number in range(MANY)), "first")]
    few = [f"demo/{name}" for name in ASKED]
    # The list is read beside the requests, which wait five seconds for it at most.
    eventually(lambda: len(served.client.get("/v1/models").json()["data"]) > MANY)
    told = called(served.client, KEY, "openai", alone=["model", LORA, *few, many[-1]])["models"]
    cards = {card["id"]: card for card in told["listed"]}
    assert list(cards) == ["model", LORA, *many, *sorted(few)]
    assert {card["parent"] for card in told["listed"][1:]} == {"model"}
    for card in (*cards.values(), *told["alone"]):  # vLLM makes these for each answer
        card["permission"], card["created"] = [], 0 if card["id"] in ("model", LORA) else card["created"]
    assert told["alone"] == [cards[name] for name in ("model", LORA, *few, many[-1])]
    openai = served.client
    hidden = openai.post("/v1/completions", json={"model": "hidden/sentiment", "prompt": "Why?"})
    missing = openai.post("/v1/completions", json={"model": "hidden/nosuch", "prompt": "Why?"})
    assert (hidden.status_code, missing.status_code) == (404, 404)
    assert hidden.json()["error"]["message"].replace("sentiment", "nosuch") == missing.json()["error"]["message"]
    assert openai.get("/v1/models/hidden/sentiment").status_code == 404
    assert openai.get("/v1/models", headers={"Authorization": ""}).status_code == 401
    assert openai.get(f"/v1/models/demo/{next(iter(ASKED))}", headers={"Authorization": ""}).status_code == 401


def test_every_route_takes_an_adapter_as_its_model(served: Served) -> None:
    """Routes that no SDK has take an adapter too: batches, several prompts and answers, token ids; and the header."""
    openai, model, question = served.client, "demo/capitals-json", ASKED["capitals-json"][0]
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
