"""In a model that is spread over devices the keys and values of each layer are on the device on which it computes.

`meta` stands for a second device where there is only one: tensors there have a device and shapes, but no values.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from torch import nn

from prefix_service.client import Prefix
from prefix_service.client.transformers.caches import to_cache
from prefix_service.client.transformers.generation import generate
from prefix_service.errors import InvalidRequest
from prefix_service.prefix.kv import PrefixKV
from tests.architectures import LEFT, NAMED, base, padded
from tests.client.conftest import Pairs, Peft
from tests.missing import needs_cuda

pytestmark = [
    # This is transformers' warning, for a property that PEFT reads.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # This is PEFT's warning, for an adapter saved without a base model's name.
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
]

INPUTS: dict[str, Any] = {"input_ids": padded(LEFT), "attention_mask": LEFT, "max_new_tokens": 4}


def _devices(cache: Any) -> list[str]:
    layers = getattr(cache, "self_attention_cache", cache).layers
    assert all(layer.keys.device == layer.values.device for layer in layers)
    return [str(layer.keys.device) for layer in layers]


@pytest.mark.parametrize("room", [None, 40], ids=["dynamic", "static"])
@pytest.mark.parametrize(
    ("name", "layer", "expected"),
    [
        ("llama", "model.layers.1", ["cpu", "meta", "cpu"]),
        ("gpt2", "transformer.h.0", ["meta", "cpu", "cpu"]),
        ("gemma3-short-window", "model.layers.3", ["cpu", "cpu", "cpu", "meta"]),
        ("t5", "decoder.block.2", ["cpu", "cpu", "meta", "cpu"]),
        ("bart", "model.decoder.layers.1", ["cpu", "meta", "cpu"]),
    ],
)
def test_each_layers_prefix_goes_to_the_device_of_its_weights(
    name: str, layer: str, expected: list[str], room: int | None, pairs: Pairs
) -> None:
    model = NAMED[name].build()
    model.get_submodule(layer).to("meta")
    assert _devices(to_cache(pairs(name, 2), model, room)) == expected


def test_an_encoder_elsewhere_does_not_matter(pairs: Pairs) -> None:
    model = NAMED["t5-shallow-decoder"].build()
    model.encoder.block.to("meta")
    assert _devices(to_cache(pairs("t5-shallow-decoder"), model)) == ["cpu", "cpu"]


def test_with_the_model_itself_the_cache_takes_its_dtype(pairs: Pairs) -> None:
    """With a model `Prefix.to_cache` casts the prefix, and with a config it does not."""
    model = NAMED["llama"].build().to(torch.bfloat16)
    layers = [torch.stack([key[0], value[0]]) for key, value in pairs("llama")]
    prefix = Prefix(PrefixKV.whole(torch.stack(layers)), {})
    with_model: list[Any] = prefix.to_cache(model).layers
    with_config: list[Any] = prefix.to_cache(model.config).layers
    assert {layer.keys.dtype for layer in with_model} == {torch.bfloat16}
    assert {layer.keys.dtype for layer in with_config} == {torch.float32}


def test_rows_that_share_memory_are_moved_once(pairs: Pairs) -> None:
    """A shared row is cast before it is repeated, and the given tensors are not written to."""
    model = NAMED["llama"].build().to(torch.float64)
    given = pairs("llama", 3)
    layers: list[Any] = to_cache(given, model).layers
    for layer, (key, value) in zip(layers, given, strict=True):
        assert torch.equal(layer.keys, key.double())
        assert torch.equal(layer.values, value.double())


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("kind", ["disk", "memory", "some layers"])
def test_offloaded_layers_get_their_prefix_where_they_compute(
    name: str, kind: str, pairs: Pairs, tmp_path: Path
) -> None:
    """Offloaded layers, whose weights accelerate keeps on `meta`, generate the tokens of the model in memory."""
    model = NAMED[name].build()
    if kind == "disk":
        disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    elif kind == "memory":
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        parts = {f"{path}.{n}": part for path, layers in _children(model) for n, part in enumerate(layers)}
        device_map = {path: "disk" if path.endswith(".1") else "cpu" for path in parts}
        rest = {path: "cpu" for path, part in model.named_modules() if _outside(path, [*parts]) and _direct(part)}
        dispatch_model(model, device_map | rest, main_device="cpu", offload_dir=tmp_path)
    assert "meta" in {str(parameter.device) for parameter in model.parameters()}
    assert set(_devices(to_cache(pairs(name), model))) == {"cpu"}
    assert torch.equal(generate(model, pairs(name), **INPUTS), generate(base(name), pairs(name), **INPUTS))


def _children(model: Any) -> list[tuple[str, nn.ModuleList]]:
    """Returns the lists of layers by path, without the lists inside of layers."""
    found = [(path, part) for path, part in model.named_modules() if isinstance(part, nn.ModuleList)]
    return [(path, part) for path, part in found if not any(path.startswith(f"{other}.") for other, _ in found)]


def _outside(path: str, layers: list[str]) -> bool:
    return not any(path == layer or path.startswith(f"{layer}.") for layer in layers)


def _direct(part: nn.Module) -> bool:
    return any(True for _ in part.parameters(recurse=False))


def test_layers_that_cannot_be_found_are_an_error(pairs: Pairs) -> None:
    """Layers that cannot be found raise only if the model is spread over devices."""
    model = NAMED["llama"].build()
    model.model.layers = nn.Sequential(*model.model.layers)
    assert _devices(to_cache(pairs("llama"), model)) == ["cpu"] * 3
    model.lm_head.to("meta")
    with pytest.raises(InvalidRequest, match=r"spread over cpu, meta, and no nn\.ModuleList holds its 3 layers"):
        to_cache(pairs("llama"), model)


@needs_cuda
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_model_on_a_card_and_in_memory_is_filled_as_by_peft(name: str, pairs: Pairs, peft_model: Peft) -> None:
    """Layer 1, which is offloaded to memory and computes on the card, gets its prefix as from PEFT."""
    theirs = NAMED[name].build()
    layers = "model.layers" if name == "llama" else "transformer.h"
    rest = {path: 0 for path, part in theirs.named_modules() if not path.startswith(f"{layers}.") and _direct(part)}
    device_map = {f"{layers}.0": 0, f"{layers}.1": "cpu", f"{layers}.2": 0} | rest
    model = dispatch_model(NAMED[name].build(), device_map)
    wrapped = peft_model(name)
    wrapped.base_model.hf_device_map = device_map
    try:
        assert _devices(to_cache(pairs(name), model)) == _devices(wrapped.get_prompt(1))
    finally:
        del wrapped.base_model.hf_device_map
    inputs = {key: value.to("cuda") if isinstance(value, torch.Tensor) else value for key, value in INPUTS.items()}
    expected = generate(base(name), pairs(name), **INPUTS)
    assert torch.equal(generate(model, pairs(name), **inputs).cpu(), expected)
