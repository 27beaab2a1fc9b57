"""The fingerprint of a base model in memory, equal to that of the folder that it was loaded from."""

from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from prefix_service.checkpoints.base_models import tokenizer_hash
from prefix_service.client.base_model_check import BaseModelCheck, compare_base_models
from prefix_service.client.transformers.devices import unwrapped
from prefix_service.errors import InvalidCheckpoint
from prefix_service.prefix.base_model_settings import settings_of
from prefix_service.prefix.fingerprint import NO_FINGERPRINT, Fingerprint
from prefix_service.prefix.weights_sample import layer_weights, start_of, weights_hash

_remembered: "WeakKeyDictionary[PreTrainedModel, Fingerprint]" = WeakKeyDictionary()


def fingerprint_of(model: PreTrainedConfig | PreTrainedModel) -> Fingerprint:
    """Returns the fingerprint of a model of transformers, or what its config alone says.

    The model may be spread over devices, wrapped by `torch.compile` or PEFT's LoRA (which does not count), and in
    any dtype; weights in float16 are comparable with float16 alone. Quantised, offloaded or sharded weights have no
    hash, and a model whose folder is gone no tokenizer. It is computed once for each model, so later changes of its
    weights are not noticed.

    Raises:
        InvalidRequest: an adapter acts in PEFT's wrapper.
    """
    if isinstance(model, PreTrainedConfig):
        return settings_of(model.to_dict())
    loaded: PreTrainedModel = unwrapped(model)
    found = _remembered.get(loaded)
    if found is None:
        found = _remembered[loaded] = _read(loaded)
    return found


def check_base_model(
    name: str, trained: Fingerprint, model: PreTrainedConfig | PreTrainedModel, mode: BaseModelCheck
) -> None:
    """Warns, or refuses, if the version `name` was made for another base model than `model`.

    Raises:
        BaseModelMismatch: it was, and `mode` is `refuse`.
        InvalidRequest: an adapter acts in PEFT's wrapper.
    """
    if mode != "off" and trained != NO_FINGERPRINT:
        compare_base_models(name, trained, fingerprint_of(model), mode)


def _read(model: Any) -> Fingerprint:
    settings = settings_of(model.config.to_dict())
    return Fingerprint(
        settings.architecture, settings.sizes, settings.rope, settings.norms, _tokenizer_of(model), _weights_of(model)
    )


def _weights_of(model: Any) -> str | None:
    weights = dict(model.named_parameters())
    sampled = {common: weights[name] for common, name in layer_weights(weights).items()}
    if not all(map(_is_whole, sampled.values())):
        return None
    return weights_hash({common: start_of(weight) for common, weight in sampled.items()})


def _is_whole(weight: Tensor) -> bool:
    """Returns whether all of a weight is here, as plain numbers: neither offloaded, nor a share of it, nor quantised by
    a library with tensors of its own."""
    return type(weight) is nn.Parameter and not weight.is_meta and weight.numel() > 0


def _tokenizer_of(model: Any) -> str | None:
    """Returns the hash of the tokenizer beside the model's files, if it was loaded from a folder."""
    folder = Path(model.name_or_path or "")
    try:
        return tokenizer_hash(folder) if model.name_or_path and folder.is_dir() else None
    except InvalidCheckpoint:
        return None
