"""Soft prompts of each type that can be compiled, which PEFT trains for a few steps and saves."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import peft
import torch

TASK: Final = 1
"""The task of a MULTITASK_PROMPT_TUNING adapter that is compared."""
_TASKS: Final = 3
_CONFIGS: Final[Mapping[str, type[Any]]] = {
    "PROMPT_TUNING": peft.PromptTuningConfig,
    "P_TUNING": peft.PromptEncoderConfig,
    "MULTITASK_PROMPT_TUNING": peft.MultitaskPromptTuningConfig,
    "CPT": peft.CPTConfig,
}
KINDS: Final = tuple(_CONFIGS)
_STEPS: Final = 3


def task_of(kind: str) -> int | None:
    """Returns the task that is compared, for the type that has tasks."""
    return TASK if kind == "MULTITASK_PROMPT_TUNING" else None


def train_soft_prompt(model: Any, kind: str, tokens: int, folder: Path) -> Path:
    """Trains a soft prompt of so many virtual tokens with PEFT, for a base model that this wraps, and saves it.

    It begins wide, so that it changes every answer, and three steps of AdamW change each of its weights.
    """
    torch.manual_seed(14)
    tuned: Any = peft.get_peft_model(model, _CONFIGS[kind](task_type="CAUSAL_LM", **_options(kind, tokens)))
    trained = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    for parameter in trained:
        torch.nn.init.normal_(parameter, std=0.8)
    optimiser = torch.optim.AdamW(trained, lr=0.1)
    tuned.train()
    for _ in range(_STEPS):
        ids = torch.randint(3, model.config.vocab_size, (_TASKS, 8))
        tasks = {} if task_of(kind) is None else {"task_ids": torch.arange(_TASKS)}
        tuned(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, **tasks).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    tuned.eval().save_pretrained(str(folder))
    return folder


def _options(kind: str, tokens: int) -> dict[str, Any]:
    """Returns the options of PEFT's config."""
    if kind == "CPT":  # its virtual tokens begin as tokens of an example: templates and texts, in turns
        ids = [5 + place % 40 for place in range(tokens)]
        types = [1 + place % 4 for place in range(tokens)]
        return {"cpt_token_ids": ids, "cpt_mask": [1] * tokens, "cpt_tokens_type_mask": types}
    more = {"P_TUNING": {"encoder_hidden_size": 16}, "MULTITASK_PROMPT_TUNING": {"num_tasks": _TASKS}}
    return {"num_virtual_tokens": tokens, **more.get(kind, {})}
