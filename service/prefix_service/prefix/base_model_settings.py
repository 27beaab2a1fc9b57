"""The settings of a base model's `config.json` that keys and values depend on, as a fingerprint has them.

The same model has the same settings here whichever release of transformers wrote its config: names differ between model
types, and rotary settings between transformers 4 (`rope_theta`, `rope_scaling`) and 5 (`rope_parameters`).
"""

from collections.abc import Mapping
from typing import Any, Final

from prefix_service.errors import InvalidConfig
from prefix_service.prefix.base_model import HEADS, LAYERS, WIDTH
from prefix_service.prefix.base_model_defaults import text_config, value_of
from prefix_service.prefix.fingerprint import Fingerprint

_SIZES: Final = {
    "num_hidden_layers": LAYERS,
    "hidden_size": WIDTH,
    "num_attention_heads": HEADS,
    "num_key_value_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim",),
    "intermediate_size": ("intermediate_size",),
}
_NORMS: Final = (
    "layer_norm_eps",
    "layer_norm_epsilon",
    "layernorm_epsilon",
    "norm_eps",
    "norm_epsilon",
    "qk_layernorm",
    "qk_norm",
    "rms_norm_eps",
    "use_qk_norm",
)
_THETA: Final = ("rope_theta", "rotary_emb_base")
_PARTIAL: Final = ("partial_rotary_factor", "rotary_pct")
_RENAMED: Final = {"mrope": "default", "su": "longrope"}
"""Types of rotary embeddings that transformers 4 wrote under another name."""


def settings_of(config: Mapping[str, Any]) -> Fingerprint:
    """Returns architecture, sizes, rotary embedding and norms of a base model's config, as far as it has them.

    Raises:
        InvalidConfig: the part for the language model is no object, or a setting is too large.
    """
    found = text_config(config)
    if not isinstance(found, Mapping):
        raise InvalidConfig(f"text_config in the base model's config must be an object, got {found!r:.80}")
    sizes = {name: number for name, names in _SIZES.items() if (number := _number(found, names)) is not None}
    norms = {name: found[name] for name in _NORMS if isinstance(found.get(name), int | float)}
    kind = found.get("model_type")
    values = {"architecture": kind, "sizes": sizes, "rope": _rope(found), "norms": norms}
    return Fingerprint.of({name: value for name, value in values.items() if value})


def _number(config: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    values = (value_of(config, name) for name in names)
    return next((value for value in values if isinstance(value, int) and not isinstance(value, bool)), None)


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the rotary settings in the form of transformers 5; empty if the config has none."""
    parameters = config.get("rope_parameters")
    if isinstance(parameters, Mapping):
        return {
            name: _rope_of_kind(value) if isinstance(value, Mapping) else value for name, value in _known(parameters)
        }
    theta, partial = (_first(config, names) for names in (_THETA, _PARTIAL))
    if theta is None:
        return {}
    scaling = config.get("rope_scaling")
    found = _rope_of_kind(scaling) if isinstance(scaling, Mapping) else {"rope_type": "default"}
    return {"rope_theta": theta, **found, **({} if partial is None else {"partial_rotary_factor": partial})}


def _rope_of_kind(parameters: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(_known(parameters))
    kind = found.pop("type", "default")
    found.setdefault("rope_type", kind)
    if isinstance(found["rope_type"], str):
        found["rope_type"] = _RENAMED.get(found["rope_type"], found["rope_type"])
    return found


def _known(parameters: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in parameters.items() if value is not None]


def _first(config: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((config[name] for name in names if config.get(name) is not None), None)
