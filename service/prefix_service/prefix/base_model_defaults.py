"""The values that transformers fills in where a base model's `config.json` leaves them out.

transformers writes only the values that differ from a model type's defaults, and knows some of them by several names.
`base_model_defaults.json` holds the defaults of transformers 5.23 by model type, so that the service need not import
it. An entry maps a name to its default, or to the name whose value is taken instead: `"num_hidden_layers": "n_layer",
"n_layer": 12`. Three entries name the model type of a nested language model instead: `text_config`, if a missing one
means that type's defaults; `flat_text_config`, if its values may also stand in the outer config; `given_text_config`,
if a missing one means something else. `python -m tests.prefix.base_model_defaults` writes the file.
"""

import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any, Final

Defaults = Mapping[str, int | str]

_TEXT: Final = ("text_config", "flat_text_config", "given_text_config")


@cache
def _table() -> Mapping[str, Defaults]:
    table: dict[str, Defaults] = json.loads(
        files("prefix_service.prefix").joinpath("base_model_defaults.json").read_bytes()
    )
    return table


def defaults_of(model_type: Any) -> Defaults:
    """Returns the defaults of a model type; empty for one that the table does not have."""
    return _table().get(model_type, {}) if isinstance(model_type, str) else {}


def text_config(config: Mapping[str, Any]) -> Any:
    """Returns the part of a base model's config that describes its language model, with its model type.

    This is `text_config`, or the part that transformers uses in its place; the whole config for a model without one.
    """
    outer = defaults_of(config.get("model_type"))
    found = next((name for name in _TEXT if name in outer), None)
    nested = config.get("text_config")
    if found is None:
        return nested or config
    default_type = outer[found]
    if nested is not None:
        known = isinstance(nested, Mapping) and nested.get("model_type") is None
        return {**nested, "model_type": default_type} if known else nested
    if found == "text_config":
        return {"model_type": default_type}
    return {**config, "model_type": default_type} if found == "flat_text_config" else config


def value_of(config: Mapping[str, Any], name: str) -> Any:
    """Returns `config[name]`, or the value that transformers uses if it is missing; None if there is neither.

    If `num_key_value_heads` is null, transformers uses the number of attention heads; if `head_dim` is null, it
    computes it.
    """
    defaults = defaults_of(config.get("model_type"))
    if name == "head_dim" and name in config:
        return config[name]
    if name == "num_key_value_heads" and name in defaults and name in config and config[name] is None:
        name = "num_attention_heads"
    while (value := config.get(name)) is None:
        default = defaults.get(name)
        if not isinstance(default, str):
            return default
        name = default
    return value
