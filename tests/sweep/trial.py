"""Asks a model for logits and tokens, with the client's prefix, and by PEFT."""

from dataclasses import dataclass
from inspect import signature
from typing import Any, Final

import torch
from torch import Tensor

from prefix_service.client import Prefix
from tests.sweep.batch import Batch
from tests.sweep.models import NUM_VIRTUAL_TOKENS
from tests.sweep.shrinking import VOCABULARY

NEW_TOKENS: Final = 8
WORDS: Final = 100
"""Ids below this are words; the ids of images and such are above, and no row may go on with one."""
_GREEDY: Final = {
    "max_new_tokens": NEW_TOKENS,
    "do_sample": False,
    "suppress_tokens": list(range(WORDS, VOCABULARY)),
}


@dataclass(frozen=True)
class Client:
    """The bare model with the prefix that a worker got."""

    model: Any
    prefix: Prefix

    def logits(self, batch: Batch) -> Tensor:
        """Returns the logits by `to_cache`, `extend_mask` and `position_ids`, `[B, S, V]`."""
        prefix = self.prefix.for_batch(len(batch.ids))
        inputs: dict[str, Any] = {**_inputs(self.model, batch), "past_key_values": prefix.to_cache(self.model.config)}
        inputs.pop("token_type_ids", None)  # PEFT drops them, in training too
        if not self.model.config.is_encoder_decoder:
            inputs["attention_mask"] = prefix.extend_mask(batch.mask)
            if (axes := _positions_along_axes(self.model, batch)) is not None:
                inputs["position_ids"] = axes + NUM_VIRTUAL_TOKENS
            elif _takes_positions(self.model):
                inputs["position_ids"] = prefix.position_ids(batch.mask)
        logits: Tensor = self.model(**inputs).logits
        return logits

    def tokens(self, batch: Batch) -> Tensor:
        """Returns the new tokens by `generate`, `[B, new]`."""
        inputs = {**batch.inputs(self.model), "attention_mask": batch.mask}
        tokens: Tensor = self.prefix.generate(self.model, **inputs, **_GREEDY)
        return tokens[:, -NEW_TOKENS:]


@dataclass(frozen=True)
class Peft:
    """PEFT's own model."""

    model: Any

    def logits(self, batch: Batch) -> Tensor:
        """Returns the logits by PEFT's forward, as in training, `[B, S, V]`; positions do not count padding."""
        _forget(self.model)
        base = self.model.get_base_model()
        inputs = _inputs(base, batch)
        # PEFT adds the prefix to positions; a model that needs none gets none, as in training.
        if (axes := _positions_along_axes(base, batch)) is not None:
            inputs["position_ids"] = axes
        elif not bool(batch.mask.all()) and _takes_positions(base):
            inputs["position_ids"] = _positions(batch.mask)
        logits: Tensor = self.model(**inputs).logits
        return logits

    def tokens(self, batch: Batch) -> Tensor:
        """Returns the new tokens by PEFT's `generate`, `[B, new]`."""
        _forget(self.model)
        inputs = batch.inputs(self.model.get_base_model())
        tokens: Tensor = self.model.generate(**inputs, attention_mask=batch.mask, **_GREEDY)
        return tokens[:, -NEW_TOKENS:]

    def tokens_by_forward(self, row: Batch) -> Tensor:
        """Returns the new tokens by PEFT's forward of the whole row for each token, `[1, new]`."""
        answer = torch.full((1, 1), self.model.get_base_model().generation_config.decoder_start_token_id)
        encoder_decoder = self.model.get_base_model().config.is_encoder_decoder
        for _ in range(NEW_TOKENS):
            if encoder_decoder:
                _forget(self.model)
                inputs = _inputs(self.model.get_base_model(), row) | {"decoder_input_ids": answer}
                logits = self.model(**inputs).logits
            else:
                logits = self.logits(row.followed_by(answer[:, 1:]))
            answer = torch.cat([answer, logits[:, -1:, :WORDS].argmax(-1)], dim=1)
        return answer[:, 1:]


def base_logits(model: Any, batch: Batch) -> Tensor:
    """Returns the logits of the model without a prefix, `[B, S, V]`."""
    _forget(model)
    inputs = _inputs(model, batch)
    if _takes_positions(model) and _positions_along_axes(model, batch) is None:
        inputs["position_ids"] = _positions(batch.mask)
    logits: Tensor = model(**inputs).logits
    return logits


def _inputs(model: Any, batch: Batch) -> dict[str, Tensor]:
    inputs = {**batch.inputs(model), "attention_mask": batch.mask}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.tensor([[2, 7, 40, 23]]).expand(len(batch.ids), -1)
    return inputs


def _takes_positions(model: Any) -> bool:
    return "position_ids" in signature(model.forward).parameters and not model.config.is_encoder_decoder


def _positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(1) - 1).clamp(min=0)


def _positions_along_axes(model: Any, batch: Batch) -> Tensor | None:
    """Returns positions along time, height and width, `[3, B, S]`, if the model places images on such axes."""
    compute = getattr(getattr(model, "model", None), "get_rope_index", None)
    if compute is None or not batch.images:
        return None
    known = signature(compute).parameters
    inputs = {name: value for name, value in batch.inputs(model).items() if name in known}
    positions: Tensor = compute(**inputs, attention_mask=batch.mask)[0]
    return positions


def _forget(model: Any) -> None:
    """Drops the rotary offsets that a model keeps from its last call, so that PEFT's call starts afresh."""
    for module in model.modules():
        if getattr(module, "rope_deltas", None) is not None:
            module.rope_deltas = None
