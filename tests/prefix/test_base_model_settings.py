"""A base model has the same settings, whichever release of transformers wrote its config."""

from typing import Any

import pytest

from prefix_service.errors import InvalidConfig
from prefix_service.prefix.base_model_settings import settings_of
from prefix_service.prefix.fingerprint import Fingerprint

_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}
_DEFAULT = {"rope_type": "default", "rope_theta": 5e5}


@pytest.mark.parametrize(
    ("config", "rope"),
    [
        ({"rope_theta": 500000, "rope_scaling": None}, _DEFAULT),
        ({"rope_parameters": _DEFAULT}, _DEFAULT),
        ({"rope_theta": 5e5, "rope_scaling": _LLAMA3}, {"rope_theta": 5e5, **_LLAMA3}),
        (
            {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
            _DEFAULT | {"rope_type": "linear", "factor": 2.0},
        ),
        (
            {"rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}},
            {"rope_theta": 1e6, "rope_type": "default", "mrope_section": [16, 24, 24]},
        ),
        (
            {"rotary_emb_base": 10000, "rotary_pct": 0.25},
            {"rope_theta": 10000, "rope_type": "default", "partial_rotary_factor": 0.25},
        ),
        (
            {"rope_parameters": {"full_attention": _DEFAULT, "sliding_attention": {"rope_theta": 1e4, "factor": None}}},
            {"full_attention": _DEFAULT, "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"}},
        ),
        ({"rope_scaling": None}, None),
        ({"rope_parameters": {"all": {"rope_type": []}}}, {"all": {"rope_type": []}}),  # whatever a file says
    ],
)
def test_rotary_settings_have_one_form(config: dict[str, Any], rope: dict[str, Any] | None) -> None:
    """What transformers 4 wrote equals what transformers 5 writes."""
    assert settings_of({"model_type": "llama", **config}).rope == rope


def test_sizes_have_one_name_and_transformers_defaults() -> None:
    """GPT-2's names are those of all, and what a config leaves out is transformers' default."""
    expected = {"num_hidden_layers": 12, "hidden_size": 8, "num_attention_heads": 12}
    assert settings_of({"model_type": "gpt2", "n_embd": 8}).sizes == expected
    assert settings_of({"model_type": "llama"}).sizes == {
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    }


def test_a_model_with_images_has_the_settings_of_its_language_model() -> None:
    """The text config counts, also where it leaves out its type."""
    text = {"num_hidden_layers": 3, "rms_norm_eps": 1e-6}
    found = settings_of({"model_type": "gemma3", "text_config": text, "vision_config": {"num_hidden_layers": 9}})
    assert (found.architecture, found.norms) == ("gemma3_text", {"rms_norm_eps": 1e-6})
    assert found.sizes is not None
    assert found.sizes["num_hidden_layers"] == 3
    with pytest.raises(InvalidConfig, match="text_config in the base model's config must be an object, got 3"):
        settings_of({"text_config": 3})


def test_an_unknown_config_says_nothing() -> None:
    """Fields of other types are no settings."""
    assert settings_of({"num_hidden_layers": "three", "rms_norm_eps": "small", "rope_theta": None}) == Fingerprint()
