"""Small models of the architectures that vLLM serves on a CPU, most with windows, and a command that tries them all.

`python -m tests.vllm.architectures [NAME …]` compares vLLM's answers with PEFT's for each of them, behind prefixes and
behind compiled soft prompts, and prints the table of README; `test_windows.py` does the same for some, without soft
prompts.
"""

import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import transformers
from transformers import PreTrainedConfig

from prefix_service.errors import InvalidRequest
from tests.vllm.asking import Adapter, Asking, started
from tests.vllm.reference import VOCABULARY, make_reference
from tests.vllm.soft_prompts import publish_soft_prompts

WINDOW: Final = 64
ADAPTERS: Final = ("a", "c", "d", "large")
"""Prefixes of 20, 64, 45 and 300 tokens."""
ROWS: Final[list[tuple[Adapter, str]]] = [
    *((adapter, prompt) for adapter in ADAPTERS for prompt in ("tiny", "short", "long")),
    (["a", "large"], "middle"),
    (["large", "d"], "tiny"),
    (None, "tiny"),
    (None, "long"),
]
_CLOSE: Final = 5e-4  # of log probabilities: norms of random weights make more of the last bit than a Llama's
_ROUNDS: Final = 2  # the second finds blocks in vLLM's prefix cache

_COMMON: Final[Mapping[str, Any]] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.08,
    "dtype": "float32",
    "sliding_window": WINDOW,
}
_EXPERTS: Final = {"num_local_experts": 4, "num_experts_per_tok": 2}
_EVERY_SECOND: Final = ["sliding_attention", "full_attention"] * 3


@dataclass(frozen=True, slots=True)
class Architecture:
    """A model to build, and options of vLLM with so few blocks and tokens a step that requests are preempted."""

    kind: str
    """The first part of transformers' name of its config."""
    layers: str
    """What its layers see, for README."""
    blocks: int
    config: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    head_dim: bool = True
    """Whether the config has a head size of its own."""

    def build(self) -> PreTrainedConfig:
        """Returns the config."""
        head = {"head_dim": 32} if self.head_dim else {}
        made: Callable[..., PreTrainedConfig] = getattr(transformers, f"{self.kind}Config")
        return made(**{**_COMMON, **head, **self.config})


ARCHITECTURES: Final = {
    "Llama": Architecture("Llama", "all", 50, {"sliding_window": None}),
    "Qwen 3": Architecture("Qwen3", "all, norms of queries and keys", 50, {"sliding_window": None}),
    "Mistral": Architecture("Mistral", "window in all", 20),
    "Qwen 2": Architecture(
        "Qwen2", "window in all", 20, {"use_sliding_window": True, "max_window_layers": 0}, head_dim=False
    ),
    "Phi-3": Architecture("Phi3", "window in all", 20, head_dim=False),
    "Gemma 2": Architecture("Gemma2", "window in every second, soft caps", 50, {"query_pre_attn_scalar": 32}),
    "Gemma 3": Architecture(
        "Gemma3Text", "window in five of six", 60, {"query_pre_attn_scalar": 32, "num_hidden_layers": 6}
    ),
    "Gemma 3, one group": Architecture(
        "Gemma3Text",
        "as above, with `--disable-hybrid-kv-cache-manager`",
        40,
        {"query_pre_attn_scalar": 32, "num_hidden_layers": 6},
        {"disable_hybrid_kv_cache_manager": True},
    ),
    "Gemma 3, two ranks": Architecture(
        "Gemma3Text",
        "as above, with `--tensor-parallel-size 2`",
        60,
        {"query_pre_attn_scalar": 32, "num_hidden_layers": 6},
        {"tensor_parallel_size": 2},
    ),
    "Gemma 3n": Architecture(
        "Gemma3nText",
        "window in every second, the last ones read an earlier one's keys",
        50,
        {
            "num_hidden_layers": 6,
            "layer_types": _EVERY_SECOND,
            "num_kv_shared_layers": 2,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 32,
            "activation_sparsity_pattern": [0.0] * 6,
            "laurel_rank": 16,
            "altup_num_inputs": 2,
        },
    ),
    "Gemma 4": Architecture(
        "Gemma4Text",
        "window in every second, the others have larger heads",
        44,
        {
            "num_hidden_layers": 6,
            "layer_types": _EVERY_SECOND,
            "global_head_dim": 64,
            "hidden_size_per_layer_input": 0,
        },
    ),
    "gpt-oss": Architecture(
        "GptOss", "window in every second, attention sinks, experts", 50, {"intermediate_size": 128, **_EXPERTS}
    ),
    "Llama 4": Architecture(
        "Llama4Text",
        "chunks in three of four, experts",
        50,
        {
            "attention_chunk_size": WINDOW,
            "intermediate_size_mlp": 256,
            "interleave_moe_layer_step": 1,
            **_EXPERTS,
            "num_experts_per_tok": 1,
        },
    ),
    # vLLM shows a layer with a window one token more than transformers does (`models/commandr.py`), so both are given
    # the window with which they see the same.
    "Cohere 2": Architecture(
        "Cohere2",
        "window in three of four, with one token more in vLLM than in transformers",
        50,
        {"sliding_window": WINDOW + 1, "logit_scale": 1.0},
        {"hf_overrides": {"sliding_window": WINDOW}},
    ),
    "Olmo 3": Architecture("Olmo3", "window in three of four", 50),
    "Exaone 4": Architecture("Exaone4", "window in three of four", 50, {"sliding_window_pattern": 4}),
    "Ministral": Architecture("Ministral", "window in every second", 50, {"layer_types": _EVERY_SECOND[:4]}),
}


def compare(asking: Asking) -> int:
    """Compares answers with PEFT's, twice, in a batch in which requests are preempted; returns how often they were."""
    asking.close = _CLOSE
    for _ in range(_ROUNDS):
        asking.run(*ROWS)
    told: dict[str, Any] = asking.engine.run([asking.job(None, "tiny")], 1)
    return int(told["preemptions"])


def compare_soft_prompts(asking: Asking) -> int:
    """Compares answers behind compiled soft prompts with PEFT's, twice; returns how many were compared."""
    asking.close = _CLOSE
    names = publish_soft_prompts(asking)
    rows: list[tuple[Adapter, str]] = [(name, prompt) for name in names for prompt in ("tiny", "short", "long")]
    for _ in range(_ROUNDS):
        asking.run(*rows)
    return _ROUNDS * len(rows)


def engine_options(architecture: Architecture) -> dict[str, Any]:
    """Returns the options of vLLM."""
    few = {"max_num_batched_tokens": 32, "num_gpu_blocks_override": architecture.blocks, "max_model_len": 448}
    return {**few, **architecture.options}


def _told_soft_prompts(asking: Asking) -> str:
    try:
        return f"{compare_soft_prompts(asking)} answers equal"
    except InvalidRequest as error:  # no prefix can be compiled for this architecture
        return f"refused: {error}"


def main(names: list[str]) -> None:
    """Prints a row for each architecture."""
    for name in names or ARCHITECTURES:
        architecture = ARCHITECTURES[name]
        with tempfile.TemporaryDirectory() as folder:
            try:
                reference = make_reference(Path(folder) / "reference", architecture.build(), ADAPTERS)
                with started(reference, Path(folder) / "engine", **engine_options(architecture)) as asking:
                    result = f"{_ROUNDS * len(ROWS)} answers equal, {compare(asking)} preemptions"
                    result += f" | {_told_soft_prompts(asking)}"
            except Exception as error:  # noqa: BLE001 - the others are tried too
                result = f"FAILED: {error!r:.300}"
        print(f"| {name} | {architecture.layers} | {result} |", flush=True)  # noqa: T201 - this is a command


if __name__ == "__main__":
    main(sys.argv[1:])
