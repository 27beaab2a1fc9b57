"""The device of each layer of a model: one device, or several if the model is spread (`device_map="auto"`)."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefix_service.errors import InvalidRequest


def to_layer_devices(
    past_key_values: Sequence[tuple[Tensor, Tensor]], model: PreTrainedModel, num_layers: int
) -> list[tuple[Tensor, Tensor]]:
    """Returns the pairs of the first `num_layers` layers, each on the device where its layer computes, in the model's
    dtype.

    Rows that share memory still share it.

    Raises:
        InvalidRequest: the model is spread over devices and its layers cannot be found.
    """
    devices = _layer_devices(model, num_layers)
    return [
        (_move(key, device, model.dtype), _move(value, device, model.dtype))
        for (key, value), device in zip(past_key_values, devices, strict=False)
    ]


def unwrapped(model: Any) -> Any:
    """Returns transformers' model inside the wrapper of `torch.compile` or PEFT (LoRA acts inside the model too).

    Raises:
        InvalidRequest: an adapter acts in PEFT's wrapper, which is bypassed here: another prefix or prompt, or aLoRA.
    """
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
            for name, config in model.peft_config.items():
                if config.is_prompt_learning or getattr(config, "alora_invocation_tokens", None):
                    raise InvalidRequest(
                        f"adapter {name!r} ({config.peft_type.value}) acts in PEFT's wrapper, and cannot be combined "
                        "with this prefix: pass the base model, model.get_base_model()"
                    )
            model = model.get_base_model()
        else:
            return model


def decoder_of(model: Any) -> Any:
    """Returns the part of a model whose layers take the prefix: an encoder-decoder model's decoder, or the language
    model of a model with images.

    If `get_decoder` returns only a head of that name, it is the model without its head.
    """
    found = model.get_decoder()
    return found if isinstance(found, PreTrainedModel) else model.base_model


def input_device(model: Any) -> torch.device:
    """Returns the device on which a model's embeddings are looked up, also if they are offloaded."""
    return next(_devices(model.get_input_embeddings()))


def _move(rows: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    own = rows[:1] if rows.stride(0) == 0 else rows
    return own.to(device, dtype).expand(rows.shape)


def _layer_devices(model: PreTrainedModel, num_layers: int) -> list[torch.device]:
    everywhere = set(_devices(model))
    if len(everywhere) == 1:
        return [*everywhere] * num_layers
    parts = decoder_of(model).modules()
    layers = next((part for part in parts if isinstance(part, nn.ModuleList) and len(part) == num_layers), None)
    if layers is None:
        spread = ", ".join(sorted(map(str, everywhere)))
        raise InvalidRequest(f"the model is spread over {spread}, and no nn.ModuleList holds its {num_layers} layers")
    return [next(_devices(layer)) for layer in layers]


def _devices(module: nn.Module) -> Iterator[torch.device]:
    """Yields the devices on which parts of `module` compute.

    This is the device to which accelerate moves a part's weights before it runs (an offloaded part has them on `meta`),
    else the device of the weights.
    """
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        hooks = getattr(hook, "hooks", [hook])
        execution = next(
            (device for each in hooks if (device := getattr(each, "execution_device", None)) is not None), None
        )
        if execution is not None:
            yield torch.device(execution)
        else:
            yield from (parameter.device for parameter in part.parameters(recurse=False))
