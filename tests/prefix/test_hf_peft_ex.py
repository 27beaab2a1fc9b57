"""What hf_peft_ex expects of its prefix tuning (config, encoder, model), held here: one test for each expectation."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from prefix_service.errors import InvalidConfig
from prefix_service.prefix.config import PrefixTuningConfig, parse_config
from prefix_service.prefix.encoder import PrefixEncoder
from prefix_service.prefix.kv import extend_mask, prefix_mask

BASE_MODEL = {"num_hidden_layers": 4, "num_attention_heads": 4, "hidden_size": 64}
SMALL: dict[str, Any] = {"num_virtual_tokens": 10, "num_layers": 4, "token_dim": 64, "num_attention_heads": 4}
PROJECTION: dict[str, Any] = {"prefix_projection": True, "encoder_hidden_size": 128}
GPT2: dict[str, Any] = {"num_virtual_tokens": 20, "num_layers": 12, "token_dim": 768}


def config(**values: Any) -> PrefixTuningConfig:
    found = parse_config({"peft_type": "PREFIX_TUNING", **values})
    assert isinstance(found, PrefixTuningConfig)
    return found


def encoder(**values: Any) -> PrefixEncoder:
    return PrefixEncoder.fresh(config(**{**SMALL, **values}), "random", 0, torch.device("cpu"))


def shapes(parameters: dict[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in parameters.items()}


def test_defaults() -> None:
    """20 tokens, no projection, no hidden size, one submodule; and it is prompt learning."""
    new = config()
    assert (new.peft_type, new.num_virtual_tokens, new.prefix_projection) == ("PREFIX_TUNING", 20, False)
    assert (new.encoder_hidden_size, new.num_transformer_submodules, new.is_prompt_learning) == (None, 1, True)


def test_values_that_are_given_stand() -> None:
    """Each field is what it was set to."""
    values = {"task_type": "CAUSAL_LM", "base_model_name_or_path": "gpt2", "inference_mode": True, **GPT2, **PROJECTION}
    new = config(**values)
    assert {name: getattr(new, name) for name in values} == values


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prefix_projection": True}, "encoder_hidden_size is required"),
        ({"num_virtual_tokens": 0}, "num_virtual_tokens must be at least 1"),
        ({"prefix_projection": True, "encoder_hidden_size": 0}, "encoder_hidden_size must be positive"),
    ],
)
def test_validation(values: dict[str, Any], message: str) -> None:
    """hf_peft_ex's words, when an untrained encoder is made."""
    with pytest.raises(InvalidConfig, match=message):
        encoder(**values)


def test_prefix_embedding_dim() -> None:
    """`num_layers * 2 * token_dim`; unknown while one of them is."""
    assert config(**GPT2).prefix_embedding_dim == 12 * 2 * 768
    assert config(token_dim=768).prefix_embedding_dim is None
    assert config(num_layers=12).prefix_embedding_dim is None


def test_trainable_parameters() -> None:
    """Without a projection, with one, and unknown."""
    assert config(**GPT2).trainable_parameters == 20 * 12 * 2 * 768
    width, hidden = 12 * 2 * 768, 512
    projected = config(**GPT2, prefix_projection=True, encoder_hidden_size=hidden)
    assert projected.trainable_parameters == 20 * 768 + 768 * hidden + hidden + hidden * width + width
    assert config().trainable_parameters is None


def test_the_same_config_comes_back_from_json() -> None:
    """A round trip loses nothing."""
    original = config(num_virtual_tokens=25, num_layers=6, token_dim=512, num_attention_heads=8, **PROJECTION)
    assert parse_config(json.loads(original.model_dump_json())) == original


def test_the_base_model_fills_what_is_missing() -> None:
    """And only that."""
    filled = config(num_virtual_tokens=10).filled(BASE_MODEL)
    assert (filled.num_layers, filled.num_attention_heads, filled.token_dim) == (4, 4, 64)
    own = config(num_virtual_tokens=10, num_layers=6, token_dim=128, num_attention_heads=8)
    assert own.filled(BASE_MODEL) == own


@pytest.mark.parametrize("options", [{}, PROJECTION], ids=["plain", "projection"])
def test_forward(options: dict[str, Any]) -> None:
    """`(batch, layers, 2, heads, tokens, head size)`, float32, every row the same."""
    out = encoder(**options).forward(2)
    assert out.shape == (2, 4, 2, 4, 10, 16)
    assert out.dtype == torch.float32
    assert torch.equal(out[0], out[1])


@pytest.mark.parametrize("batch_size", [1, 2, 4, 8])
def test_past_key_values(batch_size: int) -> None:
    """One (key, value) a layer, each `(batch, heads, tokens, head size)`."""
    pairs = encoder().encode().pairs(batch_size)
    assert len(pairs) == 4
    assert {tuple(tensor.shape) for pair in pairs for tensor in pair} == {(batch_size, 4, 10, 16)}


def test_parameter_names_without_projection() -> None:
    """One embedding of the whole width."""
    assert shapes(encoder().trainable_parameters()) == {"embedding": [10, 4 * 2 * 64]}


def test_parameter_names_with_projection() -> None:
    """Five names; matrices are `[in, out]`."""
    assert shapes(encoder(**PROJECTION).trainable_parameters()) == {
        "embedding": [10, 64],
        "transform.w1": [64, 128],
        "transform.b1": [128],
        "transform.w2": [128, 4 * 2 * 64],
        "transform.b2": [4 * 2 * 64],
    }


@pytest.mark.parametrize("options", [{}, PROJECTION], ids=["plain", "projection"])
def test_parameter_count(options: dict[str, Any]) -> None:
    """What the config promises is what the encoder holds."""
    held = sum(tensor.numel() for tensor in encoder(**options).trainable_parameters().values())
    assert held == config(**SMALL, **options).trainable_parameters


@pytest.mark.parametrize("options", [{}, PROJECTION], ids=["plain", "projection"])
def test_parameters_are_set_by_name(options: dict[str, Any]) -> None:
    """Every one of them is replaced, and the matrices multiply from the right: `tanh(E w1 + b1) w2 + b2`."""
    made = encoder(**options)
    new = {name: torch.randn(tensor.shape) / 10 for name, tensor in made.trainable_parameters().items()}
    made.set_trainable_parameters(new)
    assert all(torch.equal(tensor, new[name]) for name, tensor in made.trainable_parameters().items())
    flat = new["embedding"]
    if options:
        flat = torch.tanh(flat @ new["transform.w1"] + new["transform.b1"]) @ new["transform.w2"] + new["transform.b2"]
    torch.testing.assert_close(made.flat(), flat)


def test_the_mask_grows_by_the_prefix() -> None:
    """`(2, 20)` becomes `(2, 30)`."""
    assert extend_mask(torch.ones(2, 20), 10).shape == (2, 30)


def test_without_a_mask_it_is_ones() -> None:
    """`(2, 10)`, all ones."""
    mask = prefix_mask(2, 10)
    assert mask.shape == (2, 10)
    assert int(mask.sum()) == 20


def test_ones_come_first_and_the_mask_stays() -> None:
    """Five prefix positions, then the zeros and ones that were there."""
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])
    extended = extend_mask(mask, 5)
    assert int(extended[:, :5].sum()) == 10
    assert torch.equal(extended[:, 5:], mask)
