"""The dimensions of a prefix, read from a base model's `config.json`.

The rules are those of PEFT 0.21's `_prepare_prompt_learning_config` and of the models that PEFT learned them from. A
value that the file leaves out is the one that transformers would fill in.
"""

from collections.abc import Mapping
from typing import Any, Final

from prefix_service.errors import InvalidConfig
from prefix_service.prefix.base_model_defaults import text_config, value_of

LAYERS: Final = ("num_hidden_layers", "n_layer", "num_layers", "encoder_layers")
HEADS: Final = ("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads")
WIDTH: Final = ("hidden_size", "n_embd", "d_model")


def infer_dimensions(base_model_config: Mapping[str, Any]) -> dict[str, int | None]:
    """Returns `num_layers`, `num_attention_heads` (key/value heads) and `token_dim`; an unknown number is `None`.

    Raises:
        InvalidConfig: a number in the base model's config is not a positive integer.
    """
    config = text_config(base_model_config)
    if not isinstance(config, Mapping):
        raise InvalidConfig(f"text_config in the base model's config must be an object, got {config!r:.80}")
    layers, heads, width = (_first(config, names) for names in (LAYERS, HEADS, WIDTH))
    if config is not base_model_config:  # PEFT looks for this one number in the outer config first
        layers = _number(base_model_config, "num_hidden_layers") or layers
    kv_heads, head_dim = _key_value_shape(config, heads, width)
    return {
        "num_layers": layers,
        "num_attention_heads": kv_heads,
        "token_dim": head_dim * kv_heads if head_dim and kv_heads else width,
    }


def _key_value_shape(config: Mapping[str, Any], heads: int | None, width: int | None) -> tuple[int | None, int | None]:
    """Returns (key/value heads, head size). The head size is `None` if `token_dim` is the model's whole width."""
    per_head = width // heads if width and heads else None
    if config.get("model_type") == "gpt_bigcode" and config.get("num_key_value_heads") is None:
        return (1, per_head) if config.get("multi_query", True) is True else (heads, None)
    if config.get("multi_query_attention") is True:  # ChatGLM2 and 3
        return _number(config, "multi_query_group_num"), _number(config, "kv_channels")
    kv_heads = _number(config, "num_key_value_heads")
    if kv_heads is None:
        return heads, None
    head_dim = _number(config, "head_dim") or per_head
    # Gemma 4: its own value before transformers 5.15, the default where `per_layer_config` is left out since.
    global_head_dim = _number(config, "global_head_dim") if "per_layer_config" not in config else None
    if global_head_dim is not None:
        return _number(config, "num_global_key_value_heads") or kv_heads, global_head_dim
    return _widest_layer(config, kv_heads, head_dim)


def _widest_layer(config: Mapping[str, Any], kv_heads: int, head_dim: int | None) -> tuple[int, int | None]:
    """Returns (key/value heads, head size) of the layer with the largest head size; Gemma 4's `per_layer_config`
    overrides both for single layers, and a prefix is provisioned for the largest.
    """
    overrides = config.get("per_layer_config") or {}
    if not isinstance(overrides, Mapping):
        raise InvalidConfig(f"per_layer_config in the base model's config must be an object, got {overrides!r:.80}")
    widest = kv_heads, head_dim
    for layer in overrides.values():
        layer_dim = _number(layer, "head_dim") or head_dim
        if layer_dim is not None and layer_dim > (widest[1] or 0):
            widest = _number(layer, "num_key_value_heads") or kv_heads, layer_dim
    return widest


def _first(config: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    return next((value for name in names if (value := _number(config, name)) is not None), None)


def _number(config: Any, name: str) -> int | None:
    value = value_of(config, name) if isinstance(config, Mapping) else None
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1 << 20:
        raise InvalidConfig(f"{name} in the base model's config must be a positive integer, got {value!r:.80}")
    return value
