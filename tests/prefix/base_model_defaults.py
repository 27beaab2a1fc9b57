"""`python -m tests.prefix.base_model_defaults` writes `service/prefix_service/prefix/base_model_defaults.json` from the
installed transformers.

A model type is in the table if PEFT can size a prefix for it, and if the table's rules give the sizes that PEFT gives
for configs from which values were left out.
"""

import itertools
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Final

import peft
from peft.utils import other
from transformers import CONFIG_MAPPING

from prefix_service.prefix import base_model_defaults
from prefix_service.prefix.base_model import infer_dimensions

FILE: Final = Path(base_model_defaults.__file__).with_suffix(".json")
Entry = dict[str, int | str]

# By PEFT's order; each may be an attribute or, by `attribute_map`, another name of one.
_SIZES: Final = (
    ("num_hidden_layers", "num_layers", "n_layer"),
    ("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads"),
    ("hidden_size", "n_embd", "d_model"),
)
_SOME_GIVEN: Final = {"num_hidden_layers": 2, "num_attention_heads": 8, "hidden_size": 512}


def by_peft(config: Any) -> dict[str, Any]:
    """Returns the dimensions that PEFT fills for a base model with this config."""
    prepare: Any = other._prepare_prompt_learning_config
    filled = prepare(peft.PrefixTuningConfig(num_virtual_tokens=4), config)
    return {name: getattr(filled, name) for name in ("num_layers", "num_attention_heads", "token_dim")}


@cache
def model_types() -> tuple[tuple[str, Any], ...]:
    """Returns each model type for which PEFT fills positive dimensions, with its default config."""
    found = []
    for model_type in sorted(CONFIG_MAPPING.keys()):
        try:
            config = CONFIG_MAPPING[model_type]()
            sizes = by_peft(config).values()
        except Exception:  # noqa: BLE001, S112 - no text model, or one that PEFT cannot handle
            continue
        if all(isinstance(size, int) and size > 0 for size in sizes):
            found.append((model_type, config))
    return tuple(found)


def make_table() -> tuple[dict[str, Entry], dict[str, str]]:
    """Returns the table, and of each model type that could not enter it, the configs that it fails on."""
    table: dict[str, Entry] = {}
    failed: dict[str, str] = {}
    known = dict(model_types())
    # A nested config is looked up by its own type, so the types without one come first.
    for model_type, config in sorted(known.items(), key=lambda item: "text_config" in item[1].to_dict()):
        for entry in _candidates(model_type, config):
            table[model_type] = entry
            reason = mismatch(model_type, table)
            if reason is None:
                break
            table.pop(model_type)
            failed.setdefault(model_type, reason)
        else:
            continue
        failed.pop(model_type, None)
    return dict(sorted(table.items())), failed


def _candidates(model_type: str, config: Any) -> Iterator[Entry]:
    values = config.to_dict()
    if "text_config" in values:
        text = values["text_config"].get("model_type") if isinstance(values["text_config"], Mapping) else None
        if text:
            for name in ("text_config", "flat_text_config", "given_text_config"):
                yield {name: text}
        return
    entry: Entry = {}
    for name in itertools.chain(*_SIZES):
        target = type(config).attribute_map.get(name, name)
        if isinstance(value := values.get(target), int):
            entry |= {target: value} if target == name else {target: value, name: target}
    if "num_key_value_heads" not in values:
        yield entry
        return
    entry |= _widest_layer(config, values)
    for heads, head_dim in itertools.product(
        (values["num_key_value_heads"], "num_attention_heads"), (values.get("head_dim"), None)
    ):
        made = {**entry, "num_key_value_heads": heads}
        yield {**made, "head_dim": head_dim} if head_dim else made


def _widest_layer(config: Any, values: Mapping[str, Any]) -> Entry:
    """Returns the shape of the widest layer, where a model type computes `per_layer_config`."""
    if not values.get("per_layer_config"):
        return {}
    sizes = by_peft(config)
    heads, head_dim = sizes["num_attention_heads"], sizes["token_dim"] // sizes["num_attention_heads"]
    shared = {} if heads == values["num_key_value_heads"] else {"num_global_key_value_heads": heads}
    return {"global_head_dim": head_dim, **shared}


def mismatch(model_type: str, table: Mapping[str, Entry]) -> str | None:
    """Returns a config for which the table and PEFT differ, with both results; None if none was found."""
    module: Any = base_model_defaults
    before, module._table = module._table, lambda: table
    try:
        for given in probes(model_type, table):
            try:
                wanted = by_peft(CONFIG_MAPPING[model_type].from_dict(given))
            except Exception:  # noqa: BLE001, S112 - a combination that transformers or PEFT refuses
                continue
            found = infer_dimensions({"model_type": model_type, **given})
            if found != wanted:
                return f"{given}: {found}, PEFT has {wanted}"
    finally:
        module._table = before
    return None


def probes(model_type: str, table: Mapping[str, Entry]) -> Iterator[dict[str, Any]]:
    """Yields config.json contents of a model type with some values given, others left out."""
    entry = table[model_type]
    kind = next((name for name in entry if name.endswith("text_config")), None)
    if kind is None:
        yield from _plain_probes(model_type, entry)
        return
    # The nested type's own rules are tried with that type.
    yield from ({"text_config": given} for given in ({}, {"num_hidden_layers": 3}, _SOME_GIVEN))
    if kind != "given_text_config":
        yield from ({}, _SOME_GIVEN)


def _plain_probes(model_type: str, entry: Entry) -> Iterator[dict[str, Any]]:
    """Each value alone, some together, by their other names, and null where a class computes a value."""
    yield from ({}, {"num_hidden_layers": 3}, {"num_attention_heads": 16}, {"hidden_size": 2048}, _SOME_GIVEN)
    yield {str(entry[name]) if isinstance(entry.get(name), str) else name: value for name, value in _SOME_GIVEN.items()}
    attributes = _attributes(model_type)
    if "num_key_value_heads" in attributes:
        yield from (
            {"num_key_value_heads": 2},
            {**_SOME_GIVEN, "num_key_value_heads": 4},
            {"num_key_value_heads": None},
        )
    if "head_dim" in attributes:
        yield from ({"head_dim": 32}, {"head_dim": None}, {**_SOME_GIVEN, "head_dim": 16})


@cache
def _attributes(model_type: str) -> frozenset[str]:
    return frozenset(CONFIG_MAPPING[model_type]().to_dict()) if model_type in CONFIG_MAPPING else frozenset()


def as_json(table: Mapping[str, Entry]) -> str:
    """Returns the file's text: one model type a line."""
    lines = [f"{json.dumps(name)}: {json.dumps(entry, sort_keys=True)}" for name, entry in table.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    made, left_out = make_table()
    FILE.write_text(as_json(made))
    print(f"wrote {len(made)} model types to {FILE}")  # noqa: T201
    for name, reason in left_out.items():
        print(f"left out {name}: {reason}")  # noqa: T201
