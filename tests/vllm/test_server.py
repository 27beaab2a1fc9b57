"""SmolLM2 and its adapters on vLLM's OpenAI-compatible server say what PEFT says, in chat and in completions."""

import gzip
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from prefix_service.client.vllm.middleware import ROUTES
from tests.benchmarks.growth.folder import BIG
from tests.pages.markdown import PACKAGE, snippets
from tests.processes import eventually
from tests.vllm.served import ASKED, Served

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers' own

_ROWS: Final = [(name, question) for name in ASKED for question in ASKED[name][:3]] + [
    (None, question) for question in ASKED["capitals-json"][:3]
]


@pytest.fixture
def openai(served: Served) -> httpx.Client:
    """Returns a client of vLLM's server."""
    return served.client


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
    """Twelve requests sent together get PEFT's tokens, twice: the second time from vLLM's prefix cache."""

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
    """The completions route, with the prompt as text, gives the tokens of chat, streamed too."""
    for adapter, question in _ROWS[::3]:
        reference = adapter and f"demo/{adapter}@1"
        answer = _post(openai, "/v1/completions", reference, prompt=question["prompt"]).json()["choices"][0]
        assert answer["token_ids"] == _expected(adapter, question)
        streamed = _post(openai, "/v1/completions", reference, prompt=question["prompt"], stream=True).text
        parts = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
        assert "".join(part["choices"][0]["text"] for part in parts) == answer["text"]


def test_what_is_wrong_with_an_adapter_is_told_before_the_engine(openai: httpx.Client) -> None:
    """The middleware answers 404 or 400 with the reason, in vLLM's form, and other requests go on."""
    name, question = _ROWS[0]
    base_model = f"{BIG}/first@1 was made for another base model: weights_index is 'sampled-bfloat16-sha256:"
    refused = [
        ("demo/nosuch", {}, 404, "there is no demo/nosuch"),
        (f"{BIG}/first", {}, 400, base_model),
        ("nosuch", {}, 400, "names no tenant"),
        (7, {}, 400, "must be text such as tenant/adapter@prod"),
        (f"demo/{name}", {"prompt_logprobs": 1}, 400, "cannot have prompt_logprobs"),
        (f"demo/{name}", {"use_beam_search": True, "n": 2}, 400, "cannot have use_beam_search"),
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


_NAME: Final = "capitals-json"
_QUESTION: Final = ASKED[_NAME][0]
_PARAMS: Final = {"prefix_adapter": f"demo/{_NAME}@1"}
_ROUTER: Final = json.loads(Path(__file__).with_name("router.json").read_text())
_WITHOUT_ADAPTER: Final = frozenset({
    "/abort_requests", "/detokenize", "/generative_scoring", "/inference/v1/abort_requests", "/is_scaling_elastic_ep",
    "/ping", "/scale_elastic_ep", "/tokenize", "/v1/chat/completions/derender", "/v1/chat/completions/render",
    "/v1/completions/derender", "/v1/completions/render", "/v1/messages/count_tokens", "/v1/messages/render",
    "/v1/responses/render", "/v1/responses/{response_id}/cancel", "/v1/systemone",
})  # fmt: skip


def test_who_has_no_key_of_vllm_learns_nothing_of_adapters(openai: httpx.Client) -> None:
    """Without vLLM's key the answer is its 401, whether or not the adapter exists; vLLM leaves `/invocations` open."""
    guarded = sorted(path for path in ROUTES if path.startswith(("/v1", "/inference")))
    for path in guarded:
        for adapter in (_PARAMS["prefix_adapter"], "demo/nosuch", "nosuch"):
            for key in ("", "Bearer wrong"):
                named = {"kv_transfer_params": {"prefix_adapter": adapter}}
                answer = openai.post(path, json=named, headers={"Authorization": key})
                assert (answer.status_code, answer.json()) == (401, {"error": "Unauthorized"}), (path, adapter)
    body = {"model": "model", "prompt": "Why?", "max_tokens": 1, "kv_transfer_params": _PARAMS}
    assert openai.post("/invocations", json=body, headers={"Authorization": ""}).status_code == 200


def test_every_route_of_vllm_takes_an_adapter_or_refuses_it(openai: httpx.Client) -> None:
    """A new route of vLLM that is in neither list fails here; one that takes no adapter answers 400."""
    paths = openai.get("/openapi.json").json()["paths"]
    posted = {path for path, methods in paths.items() if "post" in methods}
    assert posted - ROUTES <= _WITHOUT_ADAPTER
    assert ROUTES - posted == {"/cohere/v2/chat"}  # needs Cohere's own packages
    for path in posted - ROUTES:
        answer = openai.post(path, json={"model": "model", "kv_transfer_params": _PARAMS})
        assert answer.status_code == 400, path
        assert "takes no adapter" in answer.json()["error"]["message"], path


def test_every_route_that_takes_an_adapter_says_what_peft_says(openai: httpx.Client) -> None:
    """Chat in each dialect and in a batch, lists of prompts, several answers and token ids say what PEFT says."""
    messages = [{"role": "user", "content": _QUESTION["question"]}]
    count = 8  # tokens: the first of them differs from the plain model's
    said = _chat(openai, _PARAMS["prefix_adapter"], _QUESTION["question"], max_tokens=count).json()["choices"][0]
    expected = _expected(_NAME, _QUESTION)[:count]
    assert said["token_ids"] == expected
    assert expected[0] != _expected(None, _QUESTION)[0]
    text = said["message"]["content"]
    base = {"model": "model", "temperature": 0, "kv_transfer_params": {**_PARAMS, "do_remote_decode": False}}

    def ask(path: str, **more: Any) -> Any:
        answer = openai.post(path, json={**base, **more})
        assert answer.status_code == 200, (path, answer.text)
        return answer.json()

    answered = ask("/v1/responses", input=_QUESTION["question"], max_output_tokens=count)
    assert answered["output"][-1]["content"][0]["text"] == text
    assert ask("/v1/messages", messages=messages, max_tokens=count)["content"][0]["text"] == text
    batch = ask("/v1/chat/completions/batch", messages=[messages, messages], max_tokens=count)
    assert [choice["message"]["content"] for choice in batch["choices"]] == [text, text]
    invoked = ask("/invocations", messages=messages, max_tokens=count)
    assert invoked["choices"][0]["message"]["content"] == text
    completed = ask("/v1/completions", prompt=[_QUESTION["prompt"]] * 2, max_tokens=count, n=1, echo=True)
    assert [choice["text"] for choice in completed["choices"]] == [_QUESTION["prompt"] + text] * 2
    several = ask("/v1/completions", prompt=_QUESTION["prompt"], max_tokens=count, n=2, temperature=1, top_k=1)
    assert [choice["text"] for choice in several["choices"]] == [text, text]
    ids = openai.post("/tokenize", json={"model": "model", "messages": messages}).json()["tokens"]
    sampling = {"temperature": 0, "max_tokens": count}
    generated = ask("/inference/v1/generate", token_ids=ids, sampling_params=sampling)
    assert generated["choices"][0]["token_ids"] == expected


def test_an_adapter_that_would_be_ignored_is_refused(openai: httpx.Client) -> None:
    """The plain model never answers for an adapter that is misspelt, misplaced, or lost by an option."""
    body = {"model": "model", "temperature": 0, "max_tokens": 2, "prompt": "Why?"}
    named = {"kv_transfer_params": _PARAMS}
    adapter = _PARAMS["prefix_adapter"]
    bodies: list[dict[str, Any]] = [
        {**named, "use_beam_search": True},
        {**named, "use_beam_search": "yes"},
        {**named, "stream": True, "use_beam_search": True},
        {**named, "echo": True, "logprobs": 1},
        {"kv_transfer_params": {**_PARAMS, "priority": 1}},
        {"kv_transfer_params": {"prefix_adaptor": adapter}},
        {"kv_transfer_params": {"adapter": adapter}},
        {"kv_transfer_param": _PARAMS},
        {"kvTransferParams": _PARAMS},
        {"prefix_adapter": adapter},
        {"prefixAdapter": adapter},
        {"adapter": adapter},
        {"extra_args": named},
        {"extra_body": named},
        {"extra_body": {"adapter": adapter}},
        {"vllm_xargs": _PARAMS},
        {"sampling_params": {"extra_args": named}},
    ]
    for more in bodies:
        answer = openai.post("/v1/completions", json={**body, **more})
        assert (answer.status_code, answer.json()["error"]["type"]) == (400, "BadRequestError"), (more, answer.text)
    twice = json.dumps({**body, **named})[:-1] + ', "kv_transfer_params": {}}'
    encoded = json.dumps({**body, **named, "use_beam_search": True}).encode("utf-16")
    for content in (twice.encode(), encoded):
        answer = openai.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400, content
    adapted = json.dumps({**body, **named}).encode()
    for content, more in (  # vLLM itself refuses what it does not read
        (gzip.compress(adapted), {"Content-Type": "application/json", "Content-Encoding": "gzip"}),
        (adapted, {"Content-Type": "text/plain"}),
    ):
        assert openai.post("/v1/completions", content=content, headers=more).status_code == 400
    for query, headers in (({"prefix_adapter": adapter}, {}), ({}, {"Prefix-Adapter": adapter})):
        assert openai.post("/v1/completions", json=body, params=query, headers=headers).status_code == 400
    for option in ("prompt_logprobs", "skip_reading_prefix_cache"):
        generate = {"token_ids": [1, 2], "sampling_params": {"max_tokens": 2, option: True}, **named}
        answer = openai.post("/inference/v1/generate", json=generate)
        assert (answer.status_code, option in answer.text) == (400, True), answer.text
    echoing = _chat(openai, adapter, "Why?", echo=True)
    assert (echoing.status_code, "prompt_logprobs" in echoing.json()["error"]["message"]) == (400, True), echoing.text
    assert openai.post("/v1/completions", json=body).status_code == 200


def test_the_dashboard_asks_for_numbers_that_vllm_has(openai: httpx.Client) -> None:
    """Each number of Grafana's panels is in vLLM's `/metrics`."""
    assert _chat(openai, _PARAMS["prefix_adapter"], "Why?", max_tokens=1).status_code == 200
    eventually(lambda: (f"demo/{_NAME}", "cpu") in _residency(openai.get("/metrics").text))
    dashboard = (PACKAGE / "deploy" / "grafana-vllm.json").read_text()
    names = set(re.findall(r"\bvllm:\w+", dashboard))
    text = openai.get("/metrics").text
    assert len(names) == 5
    assert {name for name in names if not re.search(rf"^{name}{{", text, re.MULTILINE)} == set()


def _residency(scrape: str) -> set[tuple[str, str]]:
    """Returns the loaded adapters and their levels as llm-d's router is to read vLLM's LoRAs (its pull request 2792):
    by the labels of the series of one gauge, with the name of ours."""
    families = {family.name: family for family in text_string_to_metric_families(scrape)}
    samples = families["vllm:prefix_adapter_loaded"].samples
    assert all(sample.labels.keys() == {"model_name", "engine", "adapter_name", "level"} for sample in samples)
    return {(sample.labels["adapter_name"], sample.labels["level"]) for sample in samples if sample.value == 1}


def test_a_router_reads_which_adapters_are_loaded(openai: httpx.Client) -> None:
    """The request of llm-d's router gets what the router took from it when `router.json` was recorded.

    With README's settings those are the adapters in host memory, in place of LoRAs in use; the router's own settings
    find what they find without adapters.
    """
    assert _chat(openai, _PARAMS["prefix_adapter"], "Why?", max_tokens=1).status_code == 200
    eventually(lambda: (f"demo/{_NAME}", "cpu") in _residency(openai.get("/metrics").text))
    line, _, *lines = _ROUTER["request"]  # the second is the host
    headers = {name: value for name, _, value in (header.partition(": ") for header in lines)}
    method, path, _ = line.split()
    scrape = openai.send(httpx.Request(method, openai.base_url.join(path), headers=headers)).text  # no other headers
    loaded = sorted(name for name, level in _residency(scrape) if level == "cpu" and "," not in name)
    assert f"demo/{_NAME}" in loaded
    *_, snippet = (found for found in snippets(PACKAGE / "client" / "vllm" / "README.md") if found.language == "json")
    (config,) = json.loads(snippet.text)["parameters"]["engineConfigs"]
    read = _as_router(scrape, config)
    recorded = {**_ROUTER["read with README's settings"], "ActiveModels": dict.fromkeys(loaded, 0)}
    assert read == {key: recorded[key] for key in read}
    read = _as_router(scrape, {**config, "loraSpec": "vllm:lora_requests_info"})
    assert read == {key: _ROUTER["read with its own settings"][key] for key in read}


def _as_router(scrape: str, config: dict[str, str]) -> dict[str, Any]:
    """Returns what llm-d's router takes from a scrape: a number, or labels of the series with the greatest value."""
    samples = {family.name: family.samples for family in text_string_to_metric_families(scrape)}
    lora = max(samples[config["loraSpec"]], key=lambda sample: sample.value).labels
    cache = samples[config["cacheInfoSpec"]][0].labels
    return {
        "ActiveModels": {name: 0 for name in lora["running_lora_adapters"].split(",") if name},
        "WaitingModels": {name: 0 for name in lora["waiting_lora_adapters"].split(",") if name},
        "MaxActiveModels": int(lora["max_lora"]),
        "RunningRequestsSize": samples[config["runningRequestsSpec"]][0].value,
        "WaitingQueueSize": samples[config["queuedRequestsSpec"]][0].value,
        "KVCacheUsagePercent": samples[config["kvUsageSpec"]][0].value,
        "CacheBlockSize": int(cache["block_size"]),
    }
