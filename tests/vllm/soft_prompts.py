"""Gives a reference the soft prompts that PEFT trains for its model, and a service the prefixes compiled of them."""

from collections.abc import Mapping
from typing import Final

import torch
from transformers import AutoModelForCausalLM

from prefix_service.client import PrefixClient
from prefix_service.client.transformers import compile_prefix
from tests.soft_prompts import task_of, train_soft_prompt
from tests.vllm.asking import Asking

_TOKENS: Final[Mapping[str, int]] = {"PROMPT_TUNING": 20, "P_TUNING": 64, "MULTITASK_PROMPT_TUNING": 45, "CPT": 100}
"""Virtual tokens of each: less than a block of 32, whole blocks, a block and a part, and many."""


def publish_soft_prompts(asking: Asking) -> list[str]:
    """Trains a soft prompt of each type, unless the reference has it, compiles it, and publishes the prefix.

    Returns the names of the adapters.
    """
    reference, names = asking.reference, []
    with PrefixClient(asking.server.url, asking.server.admin_key) as client:
        for kind, tokens in _TOKENS.items():
            name = kind.lower().replace("_", "-")
            compiled = reference.folder / f"{name}-compiled"
            if not compiled.exists():
                base = AutoModelForCausalLM.from_pretrained(reference.model, dtype=torch.float32)
                train_soft_prompt(base, kind, tokens, reference.adapter(name))
                base = AutoModelForCausalLM.from_pretrained(reference.model, dtype=torch.float32)
                compile_prefix(base, adapter=reference.adapter(name), task=task_of(kind)).save(compiled)
            client.publish(f"acme/{name}", compiled)
            if (task := task_of(kind)) is not None:
                reference.tasks[name] = task
            names.append(name)
    return names
