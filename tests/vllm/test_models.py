"""Adapters as models of vLLM's OpenAI-compatible server, asked through SDKs as they are: what PEFT says."""

import json
import subprocess
from pathlib import Path
from typing import Any, Final

import httpx
import pytest

from tests.conftest import Server
from tests.missing import not_tested
from tests.vllm.conftest import ASKED, VLLM_KEY
from tests.vllm.driver import PYTHON

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers' own

_ROWS: Final = [(f"demo/{name}{'@1' * number}", ASKED[name][number]) for name in ASKED for number in range(2)] + [
    ("model", question) for question in ASKED["capitals-json"][:2]
]
_MISSING: Final = "demo/nosuch"


def _called(client: httpx.Client, sdk: str) -> Any:
    """What an SDK is answered for all rows, in a process of its own."""
    rows = [[model, question["question"], question["prompt"]] for model, question in _ROWS]
    asked = {"url": str(client.base_url).rstrip("/"), "key": VLLM_KEY, "sdk": sdk, "rows": rows, "missing": _MISSING}
    program = Path(__file__).with_name("callers.py")
    done = subprocess.run(
        [str(PYTHON), str(program)], input=json.dumps(asked) + "\n", check=False, capture_output=True, text=True
    )
    if f"No module named '{sdk}'" in done.stderr:
        not_tested(f"{sdk} is not installed: tests/vllm/install adds it to .venv-vllm")
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def _said(model: str, question: dict[str, Any]) -> str:
    said: str = question["without" if model == "model" else "with"]
    return said


def test_each_token_is_that_of_peft(openai: httpx.Client) -> None:
    """By the ids, for the texts that the SDKs are compared with."""
    for model, question in _ROWS:
        body = {"model": model, "prompt": question["prompt"], "temperature": 0, "max_tokens": 24}
        answer = openai.post("/v1/completions", json={**body, "return_token_ids": True})
        choice = answer.json()["choices"][0]
        assert choice["token_ids"] == question["without_ids" if model == "model" else "with_ids"]
        assert (answer.json()["model"], choice["text"].strip()) == (model, _said(model, question).strip())


@pytest.mark.parametrize("sdk", ["openai", "litellm", "anthropic"])
def test_an_sdk_gets_what_peft_says(openai: httpx.Client, hosting: Server, sdk: str) -> None:
    """Three adapters and the plain model under way together, streamed and not, on each of the SDK's routes; the answer
    has the name that was asked for, the version and the digest."""
    answered = _called(openai, sdk)
    for (model, question), row in zip(_ROWS, answered["rows"], strict=True):
        version, digest = row.pop("headers", (None, None))
        assert (version, digest is not None) == (("1", True) if sdk == "openai" and model != "model" else (None, False))
        for call, told in row.items():
            assert told["text"].strip() == _said(model, question).strip(), (sdk, call, model)
            assert told["model"].removeprefix("hosted_vllm/") == model, (sdk, call)
            if sdk == "litellm" or model == "model":
                assert told["parameters"] is None, (sdk, call)
            else:
                assert told["parameters"]["prefix_version"] == 1, (sdk, call)
                adapter = model.partition("@")[0]
                assert told["parameters"]["prefix_adapter"].startswith(f"{adapter}@sha256:"), (sdk, call)
    assert "does not exist" in answered["missing"]


def test_the_sdk_lists_served_models_and_adapters(openai: httpx.Client) -> None:
    """Those that are allowed, each also alone; another tenant's is as if it were not there."""
    told = _called(openai, "openai")["models"]
    assert [card["id"] for card in told["listed"]] == ["model", *sorted(f"demo/{name}" for name in ASKED)]
    assert {card["parent"] for card in told["listed"][1:]} == {"model"}
    for card in (*told["listed"], *told["alone"]):  # vLLM makes these for each answer
        card["permission"], card["created"] = [], 0 if card["id"] == "model" else card["created"]
    assert told["alone"] == told["listed"]
    hidden = openai.post("/v1/completions", json={"model": "hidden/sentiment", "prompt": "Why?"})
    missing = openai.post("/v1/completions", json={"model": "hidden/nosuch", "prompt": "Why?"})
    assert (hidden.status_code, missing.status_code) == (404, 404)
    assert hidden.json()["error"]["message"].replace("sentiment", "nosuch") == missing.json()["error"]["message"]
    assert openai.get("/v1/models/hidden/sentiment").status_code == 404
    assert openai.get("/v1/models", headers={"Authorization": ""}).status_code == 401
    assert openai.get(f"/v1/models/demo/{next(iter(ASKED))}", headers={"Authorization": ""}).status_code == 401


def test_every_route_takes_an_adapter_as_its_model(openai: httpx.Client) -> None:
    """Also those that no SDK has: batches, several prompts, several answers, token ids; and the header."""
    model, question = _ROWS[0]
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
