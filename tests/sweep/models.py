"""Makes the tiny model of an architecture, with the same weights each time, and an adapter for it, written by PEFT."""

from pathlib import Path
from typing import Any, Final

import peft
import torch
import transformers
from torch import nn

from tests.sweep.names import Architecture
from tests.sweep.shrinking import tiny
from tests.sweep.special import ADAPTERS

NUM_VIRTUAL_TOKENS: Final = 6
_LARGEST: Final = 30_000_000


def build(architecture: Architecture) -> Any:
    """Returns the model: float32, frozen, in evaluation.

    Raises:
        ValueError: the shrunk config still has too many parameters to be tried.
    """
    model_class = getattr(transformers, architecture.model)
    config = tiny(model_class, architecture)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in model_class(config).parameters())
    if size > _LARGEST:
        raise ValueError(f"the config has no general sizes: {size} parameters")
    torch.manual_seed(11)
    model = model_class(config)
    torch.manual_seed(12)
    for parameter in model.parameters():  # biases and norms are not drawn wide by every model
        parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    _generate_without_end(model.generation_config)
    return model.eval().requires_grad_(False)


def _generate_without_end(generation: Any) -> None:
    """Removes the tokens that end a row early, because rows are compared token by token."""
    generation.eos_token_id = generation.forced_eos_token_id = generation.forced_bos_token_id = None
    generation.pad_token_id, generation.max_length = 0, None
    if generation.decoder_start_token_id is None:
        generation.decoder_start_token_id = 2


def save_adapter(architecture: Architecture, model: Any, folder: Path) -> None:
    """Saves an adapter of random weights, wide enough to change each token."""
    options = ADAPTERS.get(architecture.label, ADAPTERS.get(architecture.model_type, {}))
    task = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
    config = peft.PrefixTuningConfig(num_virtual_tokens=NUM_VIRTUAL_TOKENS, task_type=task, **options)
    wrapped = peft.get_peft_model(model, config)
    torch.manual_seed(13)
    for parameter in wrapped.prompt_encoder.parameters():
        nn.init.normal_(parameter, std=0.8)
    wrapped.save_pretrained(str(folder))
