"""The fingerprint of a base model, read from its folder: `config.json`, weights in safetensors, `tokenizer.json`."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from prefix_service.checkpoints.sources import readable
from prefix_service.errors import InvalidCheckpoint, InvalidConfig
from prefix_service.prefix.base_model_settings import settings_of
from prefix_service.prefix.fingerprint import Fingerprint
from prefix_service.prefix.json_text import MAX_BASE_CONFIG_BYTES, parse_config_json
from prefix_service.prefix.weights_sample import layer_weights, start_of, weights_hash

_CONFIG: Final = "config.json"
_INDEX: Final = "model.safetensors.index.json"
_TOKENIZER: Final = "tokenizer.json"


def read_fingerprint(folder: str | Path) -> Fingerprint:
    """Returns the fingerprint of the base model in a folder, as transformers' `save_pretrained` writes it.

    It does not depend on where the folder is, or on how the weights are divided among files. Without a
    `tokenizer.json`, or weights in safetensors, these fields are left out; quantised weights have no hash either.

    Raises:
        InvalidConfig: there is no `config.json`, or it describes no model.
        InvalidCheckpoint: a file cannot be read.
    """
    path = Path(folder) / _CONFIG
    if not path.is_file():
        raise InvalidConfig(f"there is no {path}: name the folder of a base model, as save_pretrained writes it")
    with readable(path):
        config = parse_config_json(path.read_bytes(), str(path), MAX_BASE_CONFIG_BYTES)
    return replace(
        settings_of(config), tokenizer=tokenizer_hash(Path(folder)), weights_index=folder_weights_hash(Path(folder))
    )


def folder_weights_hash(folder: Path) -> str | None:
    """Returns the hash of a sample of the weights in a folder; None if there are none in safetensors, or quantised
    ones.

    Raises:
        InvalidCheckpoint: a file cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    where: dict[str, Path] = {}
    starts = {}
    try:
        for path in _weight_files(folder):
            with safe_open(path, framework="pt") as file:
                where |= dict.fromkeys(file.keys(), path)
        sampled = layer_weights(where)
        for path in {where[name] for name in sampled.values()}:
            with safe_open(path, framework="pt") as file:
                for common, name in sampled.items():
                    if where[name] == path:
                        starts[common] = start_of(
                            file.get_slice(name)[:1] if _has_rows(file, name) else file.get_tensor(name)
                        )
    except (OSError, SafetensorError) as error:
        raise InvalidCheckpoint(f"the weights in {folder} cannot be read: {error}") from error
    return weights_hash(starts)


def tokenizer_hash(folder: Path) -> str | None:
    """Returns the hash of the tokens and their ids in a folder's `tokenizer.json`; None if there is no such file.

    Raises:
        InvalidCheckpoint: the file cannot be read, or holds no tokenizer.
    """
    path = folder / _TOKENIZER
    with readable(path):
        if not path.is_file():
            return None
        content = path.read_bytes()
    try:
        tokenizer = json.loads(content)
        vocabulary = tokenizer["model"]["vocab"]
        pieces = (
            vocabulary.items() if isinstance(vocabulary, dict) else ((each[0], n) for n, each in enumerate(vocabulary))
        )
        ids = {*pieces, *((token["content"], token["id"]) for token in tokenizer.get("added_tokens") or ())}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise InvalidCheckpoint(f"{path} holds no tokenizer: {error!r:.200}") from error
    return f"vocabulary-sha256:{hashlib.sha256(json.dumps(sorted(ids)).encode()).hexdigest()}"


def _weight_files(folder: Path) -> list[Path]:
    """Returns the files that transformers would load; other layouts of the same weights may lie beside them."""
    index = folder / _INDEX
    if not index.is_file():
        return sorted(folder.glob("model*.safetensors"))
    try:
        return sorted({folder / Path(name).name for name in json.loads(index.read_bytes())["weight_map"].values()})
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise InvalidCheckpoint(f"{index} names no files: {error!r:.200}") from error


def _has_rows(file: Any, name: str) -> bool:
    return len(file.get_slice(name).get_shape()) > 1
