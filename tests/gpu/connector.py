"""Compares vLLM behind a prefix with PEFT, and with real tokens in the same engine, in half precision.

In half precision greedy tokens part at near-ties, so tokens are not compared one by one. PEFT, in float32, is made to
say vLLM's tokens, and says how probable each is (*apart*: the largest difference of log probabilities) and how much
more probable its own favourite is (*behind*). A prefix in the wrong blocks is apart by whole numbers.
"""

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

import torch
from transformers import AutoModelForCausalLM

from prefix_service.client.transformers import compile_prefix
from tests.gpu.rows import NOT_RUN, Row, attempt
from tests.vllm.architectures import ARCHITECTURES
from tests.vllm.asking import Adapter, Asking
from tests.vllm.conftest import serving_adapters
from tests.vllm.driver import engine, transfer_config
from tests.vllm.publishing import publish
from tests.vllm.reference import VOCABULARY, Reference, make_reference

PART: Final = "connector"
_ADAPTERS: Final = ("a", "b", "c", "d", "large")
_ROWS: Final[list[tuple[Adapter, str]]] = [
    *((adapter, prompt) for adapter in _ADAPTERS for prompt in ("tiny", "short", "long")),
    (["a", "large"], "middle"),
    (None, "tiny"),
    (None, "short"),
    (None, "long"),
]
_TEXT: Final = 200  # real tokens
_SAID: Final = 24
_ROUNDS: Final = 2  # the second finds blocks in vLLM's prefix cache
_CLOSE: Final = 0.25  # of log probabilities, bfloat16
_CLOSE_FP8: Final = 1.5  # an FP8 cache keeps three bits of a key's fraction
_FEW_BLOCKS: Final = 1056  # tokens in all blocks, so that requests are preempted


@dataclass(frozen=True, slots=True)
class _Case:
    """Options of vLLM, and of its environment, and how close its answers must be."""

    options: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    close: float = _CLOSE
    needs_gpu: bool = True
    architecture: str | None = None
    has_windows: bool = False


_FEW: Final = {"max_num_batched_tokens": 64, "num_gpu_blocks_override": _FEW_BLOCKS // 32, "block_size": 32}
_FLASH: Final = {"attention_backend": "FLASH_ATTN"}
_CASES: Final = {
    "default attention backend": _Case(needs_gpu=False),
    "prompts in chunks, preempted requests": _Case(_FEW, needs_gpu=False),
    "windows in five of six layers (Gemma 3)": _Case(needs_gpu=False, architecture="Gemma 3", has_windows=True),
    "CUDA graphs": _Case({"enforce_eager": False}),
    "CUDA graphs, preempted requests": _Case({"enforce_eager": False, **_FEW}),
    "FP8 cache": _Case({"kv_cache_dtype": "fp8"}, close=_CLOSE_FP8, needs_gpu=False),
    "FP8 cache, CUDA graphs": _Case({"kv_cache_dtype": "fp8", "enforce_eager": False}, close=_CLOSE_FP8),
    "FlashInfer": _Case({"attention_backend": "FLASHINFER"}),
    "Triton": _Case({"attention_backend": "TRITON_ATTN"}),
    "FlexAttention": _Case({"attention_backend": "FLEX_ATTENTION"}),
    # FlashAttention by name: the default of newer cards, FlashInfer, reads heads before tokens alone there.
    "heads before tokens in a block (HND)": _Case(_FLASH, {"VLLM_KV_CACHE_LAYOUT": "HND"}),
    "tokens before heads in a block (NHD)": _Case(_FLASH, {"VLLM_KV_CACHE_LAYOUT": "NHD"}),
}


def rows(*, has_gpu: bool) -> Iterator[Row]:
    """Yields a row for each case; without a GPU most are not run, and the others use vLLM's build for CPUs."""
    with tempfile.TemporaryDirectory(prefix="prefix-gpu-") as name:
        references: dict[str | None, Reference] = {}
        for what, case in _CASES.items():
            if case.needs_gpu and not has_gpu:
                yield Row(PART, what, NOT_RUN, "there is no GPU")
                continue
            yield attempt(PART, what, partial(_compared, case, references, Path(name), has_gpu=has_gpu))


def _compared(case: _Case, references: dict[str | None, Reference], folder: Path, *, has_gpu: bool) -> str:
    if case.architecture not in references:
        references[case.architecture] = _reference(folder / f"reference-{case.architecture}", case.architecture)
    reference = references[case.architecture]
    with (
        tempfile.TemporaryDirectory(dir=folder) as place,
        patch.dict(os.environ, case.environment),
        _started(reference, Path(place), _options(case, has_gpu=has_gpu)) as asking,
    ):
        found = [_distances(asking, case) for _ in range(_ROUNDS)]
        text, tokens = _text_distances(asking)
        preemptions = asking.engine.run([asking.job(None, "tiny")], 1)["preemptions"]
    if "num_gpu_blocks_override" in case.options:
        assert preemptions > 0, "no request was preempted"
    assert text < case.close, f"behind a text's prefix {text:.3f} apart from PEFT, more than {case.close}"
    plain, behind = (max(one[key] for one in found) for key in ("plain", "adapters"))
    return (
        f"{_ROUNDS * len(_ROWS)} answers, {preemptions} preemptions; log probabilities apart: {behind:.3f} behind a "
        f"prefix, {plain:.3f} without, {text:.3f} behind a text's prefix, {tokens:.3f} behind the same text as tokens; "
        f"behind another's prefix {min(one['others'] for one in found):.1f}"
    )


def _options(case: _Case, *, has_gpu: bool) -> dict[str, Any]:
    device = {"block_size": None, "gpu_memory_utilization": 0.5} if has_gpu else {}
    return {"dtype": "bfloat16", **device, **case.options}


def _reference(folder: Path, architecture: str | None) -> Reference:
    """Makes a model and its adapters, one of them the keys and values of `text` as transformers computes them."""
    config = ARCHITECTURES[architecture].build() if architecture else None
    reference = make_reference(folder, config, _ADAPTERS)
    torch.manual_seed(11)
    reference.prompts["text"] = torch.randint(6, VOCABULARY, (_TEXT,)).tolist()
    model = AutoModelForCausalLM.from_pretrained(reference.model, dtype=torch.float32).train(mode=False)
    compile_prefix(model, token_ids=reference.prompts["text"]).save(reference.adapter("text"))
    return reference


@contextmanager
def _started(reference: Reference, folder: Path, options: dict[str, Any]) -> Iterator[Asking]:
    with serving_adapters(reference, folder) as server:
        publish(server, "acme/text", reference.adapter("text"))
        transfer = transfer_config(server.url)
        with engine(folder, reference.model, transfer, server.admin_key, **options) as made:
            yield Asking(made, reference, server)


def _distances(asking: Asking, case: _Case) -> dict[str, float]:
    """Asks for all rows in one batch; returns how far answers are from PEFT's, plain ones and those behind a prefix,
    and how far the latter are from PEFT's behind another prefix.

    Raises:
        AssertionError: an answer is not close, or as close to another prefix's.
    """
    outputs = asking.engine.run([asking.job(*row) for row in _ROWS], _SAID)["outputs"]
    found = {"plain": 0.0, "adapters": 0.0, "others": float("inf")}
    for (adapter, prompt), output in zip(_ROWS, outputs, strict=True):
        assert output["finish"] == "length", (adapter, prompt, output, asking.engine.log()[-1000:])
        named = asking.reference.join(*adapter) if isinstance(adapter, list) else adapter
        apart = _apart(asking.reference, named, prompt, output)
        assert apart < case.close, f"{adapter}, {prompt}: {apart:.3f} apart from PEFT, more than {case.close}"
        kind = "plain" if adapter is None else "adapters"
        found[kind] = max(found[kind], apart)
        # Behind a long prompt windows have forgotten any prefix, and answers behind two of them are nearly equal.
        if adapter in ("a", "b") and not (case.has_windows and prompt == "long"):
            other = _apart(asking.reference, "b" if adapter == "a" else "a", prompt, output)
            assert other > 2 * case.close, f"{adapter}, {prompt}: only {other:.3f} apart from another prefix's answer"
            found["others"] = min(found["others"], other)
    return found


def _apart(reference: Reference, adapter: str | None, prompt: str, output: Mapping[str, Any]) -> float:
    """Returns by how much PEFT's log probabilities of an answer's tokens differ from vLLM's, or by how much PEFT
    prefers another token, at most."""
    steps = reference.scores(adapter, prompt, output["tokens"])
    said = steps.gather(1, torch.tensor(output["tokens"])[:, None])[:, 0]
    apart = (said - torch.tensor(output["logprobs"])).abs().max()
    behind = (steps.max(1).values - said).max()
    return float(torch.maximum(apart, behind))


def _text_distances(asking: Asking) -> tuple[float, float]:
    """Returns how far answers behind a text's prefix are from PEFT's, and how far those behind the text's tokens in the
    same engine are from the same."""
    tokens = asking.reference.prompts["text"] + asking.reference.prompts["short"]
    jobs = [asking.job("text", "short"), {"prompt": tokens}]
    outputs = [asking.engine.run([job], _SAID)["outputs"][0] for job in jobs]
    behind, real = (_apart(asking.reference, "text", "short", output) for output in outputs)
    return behind, real
