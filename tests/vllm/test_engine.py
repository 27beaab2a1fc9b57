"""vLLM's Python API with prefixes says what PEFT says, whatever vLLM does with its cache, blocks and ranks."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from prefix_service.client import PrefixClient
from tests.client.conftest import GPT2
from tests.conftest import Server, running_server
from tests.vllm.asking import TOKENS_SAID, Adapter, Asking, started
from tests.vllm.publishing import publish
from tests.vllm.reference import VOCABULARY, Reference
from tests.vllm.soft_prompts import publish_soft_prompts

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers' own

MIXED = [("a", "short"), ("b", "short"), (None, "short"), ("c", "middle"), ("d", "long"), (None, "tiny"), ("a", "long")]
"""Adapters of the same and of other lengths, and plain requests."""


@pytest.fixture(scope="module")
def asking(reference: Reference, python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asking]:
    """Yields one engine of each version with prefix caching on, which is vLLM's default."""
    events = {"enable_kv_cache_events": True, "publisher": "null"}
    with started(reference, tmp_path_factory.mktemp("engine"), python=python, kv_events_config=events) as asking:
        yield asking


def test_a_mixed_batch_says_what_peft_says_and_again_from_the_prefix_cache(asking: Asking) -> None:
    """Adapters and plain requests share a batch; the second time each row finds its own blocks."""
    first = asking.run(*MIXED)
    second = asking.run(*MIXED)
    assert [output["cached"] for output in first] == [20, 20, 0, 64, 45, 0, 20]  # the prefix alone
    assert [output["cached"] for output in second] == [32, 32, 0, 96, 128, 0, 96]  # whole blocks behind it too
    assert first[3]["params"]["prefix_version"] == 1
    assert first[3]["params"]["prefix_adapter"].startswith("acme/c@sha256:")
    assert first[2]["params"] is None


def test_several_adapters_are_their_concatenation(asking: Asking) -> None:
    """A list of adapters says what PEFT says of the joined prefixes, also from the prefix cache. Another order is
    another prefix, and a version that is published as the concatenation has the same bits in the cache.
    """
    lists = {("a", "c"): 84, ("c", "a"): 84, ("a", "d", "a"): 85, ("b",): 20}  # tokens
    rows: list[tuple[Adapter, str]] = [(list(names), prompt) for names in lists for prompt in ("short", "long")]
    first, second = (asking.run(*rows, *MIXED) for _ in range(2))
    assert [output["cached"] for output in first[1 : len(rows) : 2]] == list(lists.values())
    whole_blocks = [(tokens + 90) // 32 * 32 for tokens in lists.values()]
    assert [output["cached"] for output in second[1 : len(rows) : 2]] == whole_blocks
    told = first[0]["params"]
    assert [one.partition("@sha256:")[0] for one in told["prefix_adapter"]] == ["acme/a", "acme/c"]
    assert told["prefix_version"] == [1, 1]
    with PrefixClient(asking.server.url, asking.server.admin_key) as client:
        client.compose("acme/composed", ["acme/a@1", "acme/c@1"])
    bits = [
        asking.engine.ask({"loaded": job})
        for job in (asking.job("composed", "short"), *(asking.job(*row) for row in rows[:4:2]))
    ]
    assert [one["tokens"] for one in bits] == [[84], [84], [84]]
    assert bits[0]["digest"] == bits[1]["digest"] != bits[2]["digest"]


@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")  # PEFT's loop of generation
def test_compiled_soft_prompts_say_what_they_say_in_peft(asking: Asking) -> None:
    """Soft prompts of PEFT's four types, trained by PEFT and compiled, share a batch with prefixes and plain requests:
    tokens and log probabilities are PEFT's, also from the prefix cache.
    """
    names = publish_soft_prompts(asking)
    rows: list[tuple[Adapter, str]] = [(name, prompt) for name in names for prompt in ("tiny", "long")]
    for _ in range(2):
        asking.run(*rows, *MIXED)


def test_without_the_salt_one_would_get_anothers_blocks(asking: Asking) -> None:
    """A plain prompt of placeholders gets an adapter's blocks only if the engine uses no salt."""
    forged = {"prompt": [0] * 64 + asking.reference.prompts["short"]}
    asking.run(("c", "short"))
    salted = asking.engine.run([forged], TOKENS_SAID)["outputs"][0]
    assert salted["cached"] == 0
    assert salted["tokens"] != asking.reference.says("c", "short", TOKENS_SAID).tokens
    try:
        assert asking.engine.ask({"salted": False}) == {"reset": True}
        asking.run(("c", "short"))
        leaked = asking.engine.run([forged], TOKENS_SAID)["outputs"][0]
        assert leaked["tokens"] == asking.reference.says("c", "short", TOKENS_SAID).tokens
    finally:
        assert asking.engine.ask({"salted": True}) == {"reset": True}
    asking.run(("c", "short"), ("d", "short"), (None, "short"))


def test_the_default_adapter_answers_those_that_name_none(asking: Asking) -> None:
    """With a default adapter, requests that name none say what PEFT says with it, beside others of their batch."""
    try:
        assert asking.engine.ask({"default": "acme/b@1"}) == {"default": "acme/b@1"}
        outputs = asking.engine.run([asking.job(*row) for row in MIXED], TOKENS_SAID)["outputs"]
    finally:
        assert asking.engine.ask({"default": None}) == {"default": None}
    for (adapter, prompt), output in zip(MIXED, outputs, strict=True):
        asking.check(output, adapter or "b", prompt)
    asking.run((None, "short"))


def test_a_salt_of_the_requests_own_separates_too(asking: Asking) -> None:
    """An equal adapter and prompt with another salt of the caller's finds no blocks."""
    one, other = ({**asking.job("d", "long"), "salt": salt} for salt in ("one", "other"))
    cached = [asking.engine.run([job])["outputs"][0]["cached"] for job in (one, one, other)]
    assert cached == [45, 128, 45]


def test_a_penalty_of_repetitions_sees_no_placeholder(asking: Asking) -> None:
    """The penalty counts prompt and answer, as in PEFT, and not the id that stands for a prefix."""
    few = list(range(6))  # the placeholder's id among them; no prompt has one
    weighed: dict[str, Any] = {"repetition_penalty": 0.3}
    asked = [(adapter, prompt) for adapter in ("a", "b", "c", "d") for prompt in asking.reference.prompts]
    jobs = [asking.job(*row, options={"allowed_token_ids": few, **weighed}) for row in asked]
    others = list(range(len(few), VOCABULARY))
    for row, output in zip(asked, asking.engine.run(jobs, 1)["outputs"], strict=True):
        expected = asking.reference.generate(*row, 1, suppress_tokens=others, **weighed)
        assert output["tokens"] == expected.tokens, row


def test_a_request_that_cannot_be_served_fails_alone(asking: Asking) -> None:
    """A request whose adapter or options cannot be served fails with the reason, and others go on."""
    publish(asking.server, "acme/other-model", GPT2)
    refused = {
        "there is no acme/nosuch": asking.job("nosuch", "short"),
        "adapter 'No Name' is not a name": asking.job("No Name", "short"),
        "must be text such as tenant/adapter@prod, or a list of such texts, got 7": {
            **asking.job(None, "short"),
            "adapter": 7,
        },
        "it was trained for another model": asking.job("other-model", "short"),
        "no room for an answer": {**asking.job("a", "short"), "prompt": [7] * 1010},
        "cannot have prompt_logprobs": asking.job("a", "short", options={"prompt_logprobs": 1}),
        "cannot have skip_reading_prefix_cache": asking.job("a", "short", options={"skip_reading_prefix_cache": True}),
        "there is no acme/other-token": {**asking.job("other-token", "short"), "prompt": [7]},
    }
    outputs = asking.engine.run([*refused.values(), *(asking.job(*row) for row in MIXED)])["outputs"]
    for reason, output in zip(refused, outputs[: len(refused)], strict=True):
        assert (output["finish"], output["tokens"]) == ("error", []), (reason, output)
        assert reason in asking.engine.log()
    for row, output in zip(MIXED, outputs[len(refused) :], strict=True):
        asking.check(output, *row)
    asking.run(*MIXED)


def test_a_misspelt_or_misplaced_adapter_is_an_error(asking: Asking) -> None:
    """The plain model never answers for an adapter that is misspelt or misplaced in `extra_args`."""
    adapter = {"prefix_adapter": "acme/a"}
    extras: dict[str, dict[str, Any]] = {
        "kv_transfer_params has 'prefix_adaptor': did you mean": {"kv_transfer_params": {"prefix_adaptor": "acme/a"}},
        "kv_transfer_params has 'adapter', which nobody": {"kv_transfer_params": {"adapter": "acme/a"}},
        "kv_transfer_params has 'lora', which nobody": {"kv_transfer_params": {**adapter, "lora": 1}},
        "the request has 'prefix_adapter', which": adapter,
        "the request has 'kv_transfer_param', which": {"kv_transfer_param": adapter},
        "the request has 'extra_args.kv_transfer_params', which": {"extra_args": {"kv_transfer_params": adapter}},
    }
    jobs = [asking.job(None, "short", extra=extra) for extra in extras.values()]
    outputs = asking.engine.run([*jobs, asking.job(None, "short", extra={"of_another_plugin": 1})])["outputs"]
    for reason, output in zip(extras, outputs[:-1], strict=True):
        assert (output["finish"], output["tokens"]) == ("error", []), (reason, output)
        assert reason in asking.engine.log()
    asking.check(outputs[-1], None, "short")


def test_a_moved_alias_is_followed_by_new_requests_alone(asking: Asking) -> None:
    """A running request ends with the version that it began with; requests a second later get the other."""
    server, count = asking.server, 120
    publish(server, "acme/moving", asking.reference.adapter("b"))
    with PrefixClient(server.url, server.admin_key) as client:
        client.put_alias("acme/moving", "prod", 1)
        logged = len(server.log.read_text())
        asking.engine.begin([asking.job("moving@prod", "short")], count)
        answers = ('/{ref}"', '"adapter":"moving"')  # which version it is, and its bytes, in either order
        _wait(lambda: all(answer in server.log.read_text()[logged:] for answer in answers))
        assert publish(server, "acme/moving", asking.reference.adapter("b2")) == 2
        client.put_alias("acme/moving", "prod", 2)
        moved = time.monotonic()
    before = asking.engine.answer()["outputs"][0]
    answered = time.monotonic()
    time.sleep(max(0.0, moved + 1 - answered))  # what an alias means is remembered for a second
    after = asking.engine.run([asking.job("moving@prod", "short")], count)["outputs"][0]
    if after["params"]["prefix_version"] == 1:  # a slow engine read the service's answer, and remembers it, until later
        time.sleep(max(0.0, answered + 1 - time.monotonic()))
        after = asking.engine.run([asking.job("moving@prod", "short")], count)["outputs"][0]
    assert [before["params"]["prefix_version"], after["params"]["prefix_version"]] == [1, 2]
    asking.check(before, "b", "short", count=count)
    asking.check(after, "b2", "short", count=count)


def _fetches(server: Server) -> int:
    """Returns the number of prefixes that were sent. The log has each of them behind its answer, and in their order."""
    mark = uuid4().hex
    with server.client() as client:
        client.get("/v1/whoami", headers={"X-Request-ID": mark})
    _wait(lambda: mark in server.log.read_text())
    return server.log.read_text().count("{ref}/prefix")


def _wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_what_the_connector_remembers_can_be_forgotten(asking: Asking) -> None:
    """The connector fetches a version it knows again only after it was reset."""
    asking.run(("a@1", "short"))
    fetched = _fetches(asking.server)
    assert asking.engine.ask({"forget": "blocks"}) == {"reset": True}
    asking.run(("a@1", "short"))
    assert _fetches(asking.server) == fetched
    assert asking.engine.ask({"forget": "all"}) == {"reset": True}
    asking.run(("a@1", "short"))
    assert _fetches(asking.server) > fetched


def test_metrics_name_the_adapters_that_are_loaded(asking: Asking) -> None:
    """Metrics name adapters in host memory until they are forgotten, and count loads, waits, bytes and failures."""
    assert asking.engine.ask({"forget": "all"}) == {"reset": True}
    asking.run((None, "short"))
    assert asking.loaded() == {"cpu": [], "gpu": []}
    before = asking.metrics()
    asking.run(("a@1", "short"), ("a", "long"), ("c", "short"), (None, "tiny"))
    asking.run((["a", "d"], "short"))
    asking.engine.run([asking.job("nosuch", "short")])
    after = asking.metrics()
    assert asking.loaded() == {"cpu": ["acme/a", "acme/a,acme/d", "acme/c"], "gpu": []}

    def more(name: str) -> float:
        return after[f"vllm:prefix_adapter_{name}"] - before[f"vllm:prefix_adapter_{name}"]

    token = 2 * 4 * 2 * 64 * 4  # keys and values of a token: layers, heads, their size, float32
    assert more("load_bytes_total") == (20 + 64 + 20 + 45) * token
    assert (more("load_seconds_count"), more("wait_seconds_count"), more("failures_total")) == (3, 4, 1)
    assert 0 < more("load_seconds_sum") < more("wait_seconds_sum") + 1e-6


def test_kv_events_name_the_adapter_where_vllm_names_a_lora(asking: Asking) -> None:
    """A router learns from vLLM's KV events which blocks are an adapter's, those of its text behind it included."""
    jobs = [asking.job(*row) for row in (("a", "long"), (["c", "d"], "short"), (None, "long"), ("nosuch", "long"))]
    stored = asking.engine.ask({"events": jobs})["stored"]
    names = [{name for name, *_ in blocks} for blocks in stored]
    assert names == [{"acme/a"}, {"acme/c,acme/d"}, {None}, set()]
    assert [sum(tokens for _, tokens, _ in blocks) for blocks in stored[:3]] == [96, 96, 64]


def test_what_kv_events_show_of_a_salt_opens_nothing(asking: Asking) -> None:
    """A plain prompt of placeholders with the key that the events show finds none of the adapter's blocks; a plain
    request that sends the salt itself would.
    """
    (blocks,) = asking.engine.ask({"events": [asking.job("c", "short")]})["stored"]
    (shown,) = {key for *_, keys in blocks for key in keys}
    forged = {"prompt": [0] * 64 + asking.reference.prompts["short"], "salt": shown}
    assert asking.engine.run([forged])["outputs"][0]["cached"] == 0
    secret = asking.engine.ask({"salt_of": asking.job("c", "short")})["salt"]
    assert asking.engine.run([{**forged, "salt": secret}])["outputs"][0]["cached"] == 64


def test_vllms_code_for_gpus_finds_the_places_of_a_prefix(asking: Asking) -> None:
    """The writers of FlashAttention, FlashInfer, Triton and FlexAttention put each key and value where these backends
    read it, in every layout of vLLM's caches, with blocks that kernels divide, and in FP8.
    """
    found = asking.engine.ask({"written": True})
    assert len({case.partition(",")[0] for case in found}) == 4
    assert {case: told for case, told in found.items() if told != "right"} == {}


def test_the_series_of_what_is_loaded_are_bounded(asking: Asking) -> None:
    """A series ends with its adapter; if servers share files, it stays at 0, also what another server has shown, and
    there are at most 1,000.

    The list for routers is one series of what is in host memory, without adapters that were asked for together; there
    is none in shared files.
    """
    many = [f"n{number}" for number in range(1000)]
    names = [
        (["b", "a"], []),
        (["b"], ["a", "c"]),
        (["a"], ["b"]),
        (many, ["a", "d"]),
        (["a,b", "b"], many),
        ([], ["b"]),
    ]
    readings = [[[(name, "cpu") for name in some] for some in reading] for reading in names]
    readings[-1][0].append(("c", "gpu"))

    def series(*, shared: bool) -> Any:
        return asking.engine.ask({"series": {"readings": readings, "shared": shared}})

    one, several = series(shared=False), series(shared=True)
    assert one["lists"] == [["a,b"], ["b"], ["a"], [",".join(sorted(many))], ["b"], [""]]
    assert several["lists"] == [[]] * len(readings)
    alone, files = one["values"], several["values"]
    assert alone[:3] == [[1, 1], [1], [1]]
    assert [sorted(values) for values in files[:3]] == [[1, 1], [0, 0, 1], [0, 0, 1]]
    assert (len(alone[3]), len(files[3]), sum(files[3])) == (1000, 1000, 997)


def test_the_service_may_restart_in_the_middle(asking: Asking) -> None:
    """While the service is away loaded versions are served; requests for the latest wait until it is back."""
    server = asking.server
    asking.run(("a@1", "short"))
    port = server.url.rpartition(":")[2]
    server.stop()
    asking.run(("a@1", "short"), (None, "short"))
    asking.engine.begin([asking.job("d", "long"), asking.job(None, "tiny")])
    time.sleep(1)
    with running_server(server.data_dir, "--port", port):
        outputs = asking.engine.answer()["outputs"]
    asking.check(outputs[0], "d", "long")
    asking.check(outputs[1], None, "tiny")


def test_chunked_prefill_and_preemption_change_nothing(reference: Reference, python: Path, tmp_path: Path) -> None:
    """Answers stay PEFT's with 32 tokens a step and too few blocks, so that requests are preempted."""
    rows = [*MIXED, ("d", "long"), ("c", "middle"), ("b", "long"), (None, "long"), ("a", "middle"), ("c", "long")]
    few: dict[str, Any] = {"max_num_batched_tokens": 32, "num_gpu_blocks_override": 33}
    with started(reference, tmp_path, python=python, **few) as asking:
        asking.run(*rows, count=64)
        asking.run(*rows, count=64)
        assert asking.engine.run([asking.job(None, "tiny")], 1)["preemptions"] > 0


def test_tensor_parallel_ranks_fetch_their_own_heads(reference: Reference, python: Path, tmp_path: Path) -> None:
    """Two ranks fetch a head each, and both report a failure."""
    with started(reference, tmp_path, python=python, tensor_parallel_size=2) as asking:
        asking.run(*MIXED)
        asking.run(*MIXED)
        failed, served = asking.engine.run([asking.job("nosuch", "short"), asking.job("a", "short")])["outputs"]
        assert failed["finish"] == "error"
        asking.check(served, "a", "short")
