"""A compiled prefix does what PEFT's virtual tokens, or the same tokens in front of the input, do."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from prefix_service.client import Prefix, PrefixClient
from prefix_service.client.transformers import CompiledPrefix, compile_prefix
from prefix_service.errors import (
    Conflict,
    DimensionMismatch,
    InvalidCheckpoint,
    InvalidConfig,
    InvalidRequest,
    PrefixServiceError,
)
from tests.architectures import LEFT, LENGTHS, NAMED, RIGHT, ROWS, base, padded
from tests.conftest import Server

pytestmark = [
    # These are PEFT's and transformers' warnings, for a base model without a name, a property that PEFT reads, and
    # PEFT's loop of generation.
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning"),
]

NEW: dict[str, Any] = {"max_new_tokens": 8, "return_dict_in_generate": True, "output_logits": True}
TEXT = torch.randint(3, 64, (1, 12), generator=torch.Generator().manual_seed(3))
"""Twelve tokens: fewer than a window of 16, more than one of 4."""

KINDS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "PROMPT_TUNING": (peft.PromptTuningConfig, {"num_virtual_tokens": 6}),
    "P_TUNING": (peft.PromptEncoderConfig, {"num_virtual_tokens": 6, "encoder_hidden_size": 16}),
    "MULTITASK_PROMPT_TUNING": (peft.MultitaskPromptTuningConfig, {"num_virtual_tokens": 6, "num_tasks": 3}),
    "CPT": (
        peft.CPTConfig,
        {"cpt_token_ids": [5, 6, 7, 8, 9, 10], "cpt_mask": [1] * 6, "cpt_tokens_type_mask": [1, 2, 3, 4, 1, 2]},
    ),
}
TASK = {"MULTITASK_PROMPT_TUNING": 1}

Served = Callable[[str, CompiledPrefix], Prefix]


@pytest.fixture(scope="module")
def served(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Served:
    """Returns a function that publishes a compiled prefix to the real server, and fetches it."""

    def publish_and_get(name: str, compiled: CompiledPrefix) -> Prefix:
        folder = tmp_path_factory.mktemp("compiled") / "adapter"
        compiled.save(folder)
        with PrefixClient(server.url, server.admin_key) as client:
            client.publish(f"compiled/{name.lower().replace('_', '-')}", folder)
            return client.get(f"compiled/{name.lower().replace('_', '-')}")

    return publish_and_get


@pytest.fixture(scope="session")
def soft_prompt(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """Returns the folder in which PEFT saved a soft prompt of a kind for an architecture."""

    def saved(name: str, kind: str) -> Path:
        config_type, options = KINDS[kind]
        model = peft.get_peft_model(NAMED[name].build(), config_type(task_type="CAUSAL_LM", **options))
        torch.manual_seed(14)
        for parameter in model.prompt_encoder.parameters():
            nn.init.normal_(parameter, std=0.8)
        folder = tmp_path_factory.mktemp(kind.lower())
        model.save_pretrained(folder)
        return folder

    return cache(saved)


def require_same(found: Any, expected: Any, width: int, theirs: int) -> None:
    """Checks new tokens behind `width` and `theirs` input ids, and the logits of each step."""
    assert torch.equal(found.sequences[:, width:], expected.sequences[:, theirs:])
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), rtol=0, atol=5e-5)


# --- Tokens ---


@pytest.mark.parametrize(
    "name",
    [
        *("llama", "gpt2", "qwen3", "opt", "bloom", "falcon-grouped", "falcon-alibi-16-heads", "gpt-bigcode"),
        *("mistral", "mistral-short-window", "gemma2-short-window", "gemma3", "gemma3-short-window", "gemma4"),
        *("gemma4-shared-layers", "gemma4-wider-sliding-layers", "mpt", "gpt-neo-local"),
    ],
)
def test_behind_compiled_tokens_a_model_says_what_it_says_behind_the_tokens(
    name: str, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy tokens and logits of padded rows are those of transformers with the same tokens in front."""
    monkeypatch.setattr("prefix_service.client.transformers.compiling._CHUNK", 5)
    model = base(name)
    prefix = served(name, compile_prefix(model, token_ids=TEXT[0].tolist()))
    whole = {
        "input_ids": torch.cat([TEXT.expand(3, -1), padded(LEFT)], 1),
        "attention_mask": torch.cat([torch.ones(3, TEXT.shape[1]), LEFT], 1),
    }
    found = prefix.generate(model, input_ids=padded(LEFT), attention_mask=LEFT, **NEW)
    require_same(found, model.generate(**whole, **NEW), LEFT.shape[1], whole["input_ids"].shape[1])
    tokens = prefix.generate(model, input_ids=padded(RIGHT), attention_mask=RIGHT, max_new_tokens=8)
    for row, own in enumerate(ROWS):
        ids = torch.cat([TEXT, own], 1)
        alone = model.generate(ids, attention_mask=torch.ones(ids.shape), max_new_tokens=8)[0, ids.shape[1] :]
        assert torch.equal(tokens[row, RIGHT.shape[1] :], alone)


# --- Soft prompts ---


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "qwen3", "mistral-short-window", "gemma2-short-window", "gemma3", "opt", "bloom"]
)
def test_a_compiled_soft_prompt_does_what_it_does_in_peft(
    name: str, kind: str, soft_prompt: Callable[[str, str], Path], served: Served
) -> None:
    """Greedy tokens and logits are PEFT's, for padded rows and for each row alone."""
    folder, model = soft_prompt(name, kind), base(name)
    prefix = served(f"{name}-{kind}", compile_prefix(model, adapter=folder, task=TASK.get(kind)))
    theirs = NAMED[name].peft(folder)
    inputs: dict[str, Any] = {"input_ids": padded(LEFT), "attention_mask": LEFT}
    chosen = {"task_ids": torch.tensor([1])} if kind in TASK else {}
    tasks = {"task_ids": torch.tensor([1] * 3)} if kind in TASK else {}
    # PEFT drops positions, so that models which take them count the padding on the left.
    own = {} if name in ("opt", "bloom") else {"position_ids": torch.arange(LEFT.shape[1]).expand(3, -1)}
    found = prefix.generate(model, **inputs, **own, **NEW)
    require_same(found, theirs.generate(**inputs, **tasks, **NEW), LEFT.shape[1], LEFT.shape[1])
    tokens = prefix.generate(model, input_ids=padded(RIGHT), attention_mask=RIGHT, max_new_tokens=8)
    for row, (ids, length) in enumerate(zip(ROWS, LENGTHS, strict=True)):
        alone = theirs.generate(input_ids=ids, max_new_tokens=8, **chosen)[0, length:]
        assert torch.equal(tokens[row, RIGHT.shape[1] :], alone)
