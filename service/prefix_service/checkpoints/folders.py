"""Writes the folder of an adapter, which `publish` takes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefix_service.errors import Conflict, StorageFailed
from prefix_service.prefix.config import write_config
from prefix_service.prefix.file_names import BASE_MODEL_NAME, CONFIG_NAME, RECIPE_KEYS, RECIPE_NAME, WEIGHTS_NAME
from prefix_service.prefix.fingerprint import NO_FINGERPRINT, Fingerprint

if TYPE_CHECKING:
    from torch import Tensor


def check_folder(folder: Path) -> None:
    """Checks that a folder has no adapter yet.

    Raises:
        Conflict: the folder contains one of an adapter's files already.
    """
    for name in (CONFIG_NAME, WEIGHTS_NAME, RECIPE_NAME, BASE_MODEL_NAME):
        if (folder / name).exists():
            raise Conflict(f"{folder / name} exists: choose an empty folder")


def write_folder(
    folder: Path,
    config: Mapping[str, Any],
    tensors: "Mapping[str, Tensor]",
    recipe: Mapping[str, str] | None = None,
    base_model: Fingerprint = NO_FINGERPRINT,
) -> None:
    """Writes an adapter's config and tensors to a folder, created if it does not exist; with its recipe and its base
    model's fingerprint, if it has them.

    Raises:
        Conflict: the folder contains one of the files already.
        StorageFailed: the folder cannot be written.
    """
    from safetensors.torch import save_file

    check_folder(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(dict(tensors), folder / WEIGHTS_NAME)
        write_recipe(folder, recipe or {})
        write_base_model(folder, base_model)
        (folder / CONFIG_NAME).write_bytes(write_config(dict(config)) + b"\n")
    except OSError as error:
        raise StorageFailed(f"{folder} cannot be written: {error.strerror}") from error


def write_recipe(folder: Path, annotations: Mapping[str, str]) -> None:
    """Writes the recipe of a compiled prefix to its folder, if it is among its annotations.

    Raises:
        OSError: the disk refused.
    """
    recipe = {key: text for key, text in annotations.items() if key.startswith(RECIPE_KEYS)}
    if recipe:
        (folder / RECIPE_NAME).write_text(json.dumps(recipe, indent=2, sort_keys=True) + "\n")


def write_base_model(folder: Path, base_model: Fingerprint) -> None:
    """Writes the fingerprint of an adapter's base model to its folder, if it is known.

    Raises:
        OSError: the disk refused.
    """
    if base_model != NO_FINGERPRINT:
        (folder / BASE_MODEL_NAME).write_text(json.dumps(base_model.known(), indent=2, sort_keys=True) + "\n")
