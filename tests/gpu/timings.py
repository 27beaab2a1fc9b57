"""Measures what only a GPU shows: how soon 268 MB are in vLLM's cache, and its first token behind 20 to 16,384 tokens.

The model has the dimensions of Llama 3 8B and random weights: times do not depend on them. Without a GPU a tiny model
stands in for some lengths, so that the code is run; its figures mean nothing.
"""

import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import torch
from transformers import LlamaConfig

from prefix_service.client import PrefixClient
from tests.benchmarks.speed.harness import QUIET, Spread, in_turns, say
from tests.benchmarks.vllm import first_token
from tests.conftest import Server, running_server
from tests.gpu.rows import NOT_RUN, PASSED, Row, attempt, failed
from tests.vllm.driver import Engine, engine, transfer_config
from tests.vllm.publishing import publish

PART: Final = "benchmarks"
_LENGTHS: Final = (20, 64, 256, 1024, 2048, 4096, 16384)
_CARTRIDGE: Final = 2048  # tokens: 268 MB in bfloat16
_NO_GPU: Final = "there is no GPU; of a tiny model on the CPU"
_PUBLISHED: Final = {16384: "10.6 times"}
_PROMPT: Final = 32
_ROUNDS: Final = 5
_LARGE: Final = 16 << 30
_MEMORY: Final = 40 << 30  # bytes: 16 GB of weights, 2.2 GB of cache, the service's prefixes, and room
_CASES: Final = (
    first_token.NEW,
    first_token.FETCHED,
    first_token.BLOCKS,
    first_token.TEXT,
    first_token.TEXT_BLOCKS,
    first_token.TRANSFER,
)


def rows(*, has_gpu: bool) -> Iterator[Row]:
    """Yields a row of times for each length, and those of the copy."""
    if has_gpu and torch.cuda.get_device_properties(0).total_memory < _MEMORY:
        yield Row(PART, "all", NOT_RUN, f"the model and its prefixes need {_MEMORY >> 30} GiB of GPU memory")
        return
    lengths, config = (_LENGTHS, _llama()) if has_gpu else ((*_LENGTHS[:2], _CARTRIDGE), _tiny())
    try:
        found = _measured(config, lengths, has_gpu=has_gpu)
    except Exception as error:  # noqa: BLE001 - the table shows it
        yield failed(PART, "all", error)
        return
    for length, times in found.items():
        yield _row(f"first token behind {length:,} tokens, ms", _told(length, times), has_gpu=has_gpu)
    into = "268 MB, resident in the service or the worker, into vLLM's cache"
    yield _row(into, _copy(found[_CARTRIDGE], _nbytes(config)), has_gpu=has_gpu)
    to = "268 MB in host memory to the GPU"
    yield attempt(PART, to, _plain_copy) if has_gpu else Row(PART, to, NOT_RUN, "there is no GPU")


def _row(what: str, told: str, *, has_gpu: bool) -> Row:
    return Row(PART, what, PASSED, told) if has_gpu else Row(PART, what, NOT_RUN, f"{_NO_GPU}: {told}")


def _told(length: int, times: dict[str, list[float]]) -> str:
    ms = {case: Spread.of([one * 1000 for one in times[case]]) for case in _CASES}
    told = "; ".join(f"{case}: {ms[case]}" for case in _CASES)
    gain = ms[first_token.TEXT].median / ms[first_token.FETCHED].median
    published = f" (published {_PUBLISHED[length]})" if length in _PUBLISHED else ""
    return f"{told}; real tokens take {gain:.1f} times as long as a fetched adapter{published}"


def _nbytes(config: Any) -> int:
    """Returns the bytes of 2,048 virtual tokens in bfloat16."""
    nbytes: int = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * _CARTRIDGE * 2
    return nbytes


def _copy(times: dict[str, list[float]], nbytes: int) -> str:
    """Returns the seconds and the rate at which so many bytes come from the service, and from the worker's memory."""
    medians = {case: Spread.of(times[case]).median for case in _CASES}
    told = []
    for case in (first_token.NEW, first_token.FETCHED):
        seconds = medians[case] - medians[first_token.BLOCKS]
        told.append(f"{case}: {seconds * 1000:.1f} ms, {nbytes / seconds / 1e9:.1f} GB/s")
    return "; ".join(told)


def _plain_copy() -> str:
    told = []
    for kind, pinned in (("pinned", True), ("plain", False)):
        host = torch.empty(_nbytes(_llama()), dtype=torch.uint8, pin_memory=pinned)
        seconds = []
        for _ in range(_ROUNDS + 1):
            torch.cuda.synchronize()
            began = time.perf_counter()
            host.to("cuda", non_blocking=True)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
        median = Spread.of(seconds[1:]).median
        told.append(f"{kind}: {median * 1000:.1f} ms, {host.nbytes / median / 1e9:.1f} GB/s")
    return "; ".join(told)


def _measured(config: LlamaConfig, lengths: tuple[int, ...], *, has_gpu: bool) -> dict[int, dict[str, list[float]]]:
    environment = {
        **QUIET,
        **{f"PREFIX_{name}_BYTES": str(_LARGE) for name in ("DEVICE", "RENDERING", "WORK", "MAX_UPLOAD")},
        "PREFIX_DEVICE": "cpu",  # the card is the engine's
    }
    with tempfile.TemporaryDirectory(prefix="prefix-gpu-") as name, ExitStack() as stack:
        folder = Path(name)
        config.save_pretrained(folder / "model")
        server = stack.enter_context(running_server(folder / "data", environment=environment))
        for length in lengths:
            adapter = first_token.write_adapter(folder / f"n{length}", config, length, torch.bfloat16)
            publish(server, f"bench/n{length}", adapter)
        options: dict[str, Any] = {
            "load_format": "dummy",
            "dtype": "bfloat16",
            "max_model_len": max(lengths) + 256,
            "max_num_batched_tokens": max(lengths) + 256,  # a prompt is computed in one step
        }
        if has_gpu:
            options |= {"enforce_eager": False, "block_size": None, "gpu_memory_utilization": 0.85}
        transfer = transfer_config(server.url, cache_bytes=_LARGE)
        started = stack.enter_context(
            engine(folder / "engine", folder / "model", transfer, server.admin_key, **options)
        )
        found = {}
        for length in lengths:
            say(f"{length} tokens, {_ROUNDS} rounds")
            found[length] = in_turns(_cases(started, server, length, config.vocab_size), _ROUNDS)
        return found


def _cases(started: Engine, server: Server, length: int, vocabulary: int) -> dict[str, Any]:
    words = random.Random(length)  # noqa: S311
    prompt, text = ([words.randrange(10, vocabulary) for _ in range(count)] for count in (_PROMPT, length))
    with PrefixClient(server.url, server.admin_key, cache_bytes=0) as client:
        client.get(f"bench/n{length}", dtype="bfloat16")  # from disk, once
    return first_token.engine_cases(started, server, f"bench/n{length}", prompt, text, "bfloat16")


def _llama() -> LlamaConfig:
    return LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=128_256,
        max_position_embeddings=131_072,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )


def _tiny() -> LlamaConfig:
    return LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=1000,
        max_position_embeddings=4096,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
