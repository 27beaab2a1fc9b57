"""Decides whether a model counts padding, and moves the padding of rows to the other side.

Behind a prefix, padding on the left is between the prefix and the row: `[prefix][padding][tokens]`. The mask hides it,
but some models count it: in positions, in the distance to the prefix, or in a window.
"""

from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.generation.utils import MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL

from prefix_service.client.transformers.devices import decoder_of
from prefix_service.errors import InvalidRequest

Model = Any
"""A `PreTrainedModel` that is a `GenerationMixin`; transformers has no type for both."""

_PER_TOKEN = ("position_ids", "mm_token_type_ids", "moe_mm_token_type_ids")
"""Names of tensors `[..., B, S]` that move with their tokens."""
_PER_IMAGE = (*MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL, "image_grid_thw", "video_grid_thw", "second_per_grid_ts")
"""Names of tensors whose entries find their tokens by placeholder ids, in the order of rows.

Padding is irrelevant to them.
"""

_POSITIONS_FROM_MASK = {"bloom"}
"""Models without `position_ids` that count the ones of the mask instead of the slots of the cache."""
_OWN_FULL_ATTENTION = {"biogpt", "bloom", "codegen", "falcon", "gpt_neox_japanese", "gptj", "stablelm", "xglm"}
"""Models with attention of their own whose code was read (5.23.0): all tokens of the mask are seen."""


def follows_mask(model: Model) -> bool:
    """Returns whether positions follow from the mask or from `position_ids`, wherever in the cache a row starts."""
    decoder = decoder_of(model)
    if decoder.config.model_type in _POSITIONS_FROM_MASK:
        return True
    takes_them = all("position_ids" in signature(part.forward).parameters for part in (model, decoder))
    return takes_them and _passes_positions_on(model)


def _passes_positions_on(model: Model) -> bool:
    """Returns whether `generate` passes the given positions on to the model; some models drop them before each step."""
    ids = torch.zeros(1, 1, dtype=torch.int64)
    prepared = model.prepare_inputs_for_generation(ids, attention_mask=ids + 1, position_ids=ids, use_cache=True)
    return prepared.get("position_ids") is not None


def padding_shows(model: Model, length: int) -> bool:
    """Returns whether padding between prefix and input can change a row of `length` tokens, including prefix and new
    tokens.

    It cannot if positions follow the mask, no window is shorter than the row, and no longer row of the batch changes
    this one's rotary frequencies. The windows of transformers' shared attention are in the config, as the cache's
    layers read it; a model with attention of its own may have others. Mllama's cross-attention layers take the prefix
    for an image, without a mask and in the order of the input.
    """
    decoder = decoder_of(model)
    if not decoder._supports_attention_backend and decoder.config.model_type not in _OWN_FULL_ATTENTION:
        return True
    if not follows_mask(model) or getattr(decoder.config, "cross_attention_layers", None):
        return True
    if length > rope_changes_behind(decoder.config) or length >= _scale_changes_at(decoder.config):
        return True
    windows = (getattr(layer, "sliding_window", None) for layer in DynamicCache(config=decoder.config).layers)
    return any(window is not None and length > window for window in windows)


def rope_changes_behind(config: Any) -> float:
    """Returns the length up to which a row's rotary frequencies do not depend on the longest row of its batch."""
    ropes = getattr(config, "rope_parameters", None) or {}
    each = [ropes] if "rope_type" in ropes else [rope for rope in ropes.values() if isinstance(rope, dict)]
    changing = [rope for rope in each if "dynamic" in rope["rope_type"] or rope["rope_type"] == "longrope"]
    lengths = (
        holder.get(name)
        for rope in changing
        for holder, name in (
            (rope, "original_max_position_embeddings"),
            (vars(config), "original_max_position_embeddings"),
            (vars(config), "max_position_embeddings"),
        )
    )
    return min((length for length in lengths if length is not None), default=float("inf"))


def _scale_changes_at(config: Any) -> float:
    """Returns the length from which Llama 4 scales queries by their slot in the cache."""
    return config.floor_scale if getattr(config, "attn_temperature_tuning", False) else float("inf")


def moved(tensors: dict[str, Any], order: Tensor) -> dict[str, Tensor]:
    """Returns the tensors that have one entry per token, put into `order`, `[B, S]`.

    Raises:
        InvalidRequest: it is unknown whether a tensor has one entry per token.
    """
    given = {
        name: tensor
        for name, tensor in tensors.items()
        if isinstance(tensor, Tensor) and tensor.ndim > 1 and name not in _PER_IMAGE
    }
    if unknown := [name for name in given if name not in _PER_TOKEN]:
        raise InvalidRequest(f"{', '.join(unknown)} cannot be served with right padding; pad on the left")
    return {name: tensor.gather(-1, order.expand(tensor.shape)) for name, tensor in given.items()}
