"""The sampled weights have the same names in every file and model that holds them."""

import pytest
import torch

from prefix_service.prefix.weights_sample import layer_weights, start_of, weights_hash

_LAYER = "layers.0.self_attn.k_proj.weight"


@pytest.mark.parametrize(
    "name",
    [
        _LAYER,
        f"model.{_LAYER}",
        f"model.language_model.{_LAYER}",
        f"language_model.model.{_LAYER}",
        "base_model.model.model.layers.0.self_attn.k_proj.base_layer.weight",
    ],
)
def test_what_is_around_the_layers_does_not_count(name: str) -> None:
    """A weight is named from its layer on, and LoRA's wrapper is not part of the name."""
    assert layer_weights([name]) == {_LAYER: name}


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.layers.0.self_attn.k_proj.bias",
        "model.layers.0.mlp.experts.3.w1.weight",
        "model.layers.0.self_attn.k_proj.lora_A.default.weight",
    ],
)
def test_other_weights_are_left_out(name: str) -> None:
    """Embeddings, heads, biases, experts and LoRA are not sampled."""
    assert layer_weights([name]) == {}


def test_the_language_model_is_sampled() -> None:
    """Of several stacks of layers it is the one that takes a prefix, else the largest."""
    vision = [f"model.vision_tower.encoder.layers.{n}.mlp.fc1.weight" for n in range(3)]
    text = ["model.language_model.layers.0.mlp.up_proj.weight"]
    assert [*layer_weights([*vision, *text])] == ["layers.0.mlp.up_proj.weight"]
    assert len(layer_weights([*vision, "mtp.layers.0.fc.weight"])) == 3


def test_a_hash_is_of_its_kind() -> None:
    """float32 is hashed as bfloat16, a name or a value changes the hash, and what is quantised has none."""
    start = start_of(torch.tensor([[1.001, 2.0], [3.0, 4.0]]))
    assert start.tolist() == pytest.approx([1.001, 2.0])
    found = weights_hash({"a": start})
    assert found == weights_hash({"a": start.bfloat16()}) != weights_hash({"b": start})
    assert found != weights_hash({"a": start + 1})
    assert weights_hash({"a": start.half(), "b": start}) == weights_hash({"a": start, "b": start.half()}) != found
    assert weights_hash({}) is None
    assert weights_hash({"a": start, "b": start.to(torch.int8)}) is None
    assert weights_hash({"a": start.double()}) is None
