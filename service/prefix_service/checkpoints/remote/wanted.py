"""Chooses the files of an adapter among those of a folder elsewhere, and bounds their sizes before they come."""

from collections.abc import Mapping
from typing import Final

from prefix_service.checkpoints.sources import is_weights_name
from prefix_service.errors import InvalidCheckpoint, NotFound, TooLarge
from prefix_service.prefix.description import MOST_CARD
from prefix_service.prefix.file_names import BASE_MODEL_NAME, CARD_NAME, CONFIG_NAME, RECIPE_NAME, WEIGHTS_NAME
from prefix_service.prefix.json_text import MAX_CONFIG_BYTES

BESIDE: Final = {
    CONFIG_NAME: MAX_CONFIG_BYTES,
    CARD_NAME: MOST_CARD,
    RECIPE_NAME: MAX_CONFIG_BYTES,
    BASE_MODEL_NAME: MAX_CONFIG_BYTES,
}
"""The files beside the weights, and the most bytes of each."""

MOST_FILES: Final = 10_000
"""The most files that are listed in one place."""


def files_at(listing: Mapping[str, int], path: str) -> tuple[str, dict[str, int]]:
    """Returns the folder that `path` names, and the sizes of the files directly in it by name; of a file alone with
    those beside its weights, if `path` is a file.

    Raises:
        NotFound: there is nothing at the path.
    """
    folder, _, name = path.rpartition("/") if path in listing else (path, "", "")
    start = f"{folder}/" if folder else ""
    found = {
        file.removeprefix(start): size
        for file, size in listing.items()
        if file.startswith(start) and "/" not in file.removeprefix(start)
    }
    if name:
        found = {file: size for file, size in found.items() if file == name or file in BESIDE}
    if not found:
        raise NotFound(f"there are no files at {path or 'the top'}: name the adapter's folder")
    return folder, found


def wanted_files(sizes: Mapping[str, int], most: int) -> tuple[str, list[str]]:
    """Returns the name of the weights among the files of a folder, and the names of all files to download.

    `most` bounds the bytes of the weights.

    Raises:
        InvalidCheckpoint: there are no weights, or several files that may be the weights.
        TooLarge: a file is larger than an adapter's may be.
    """
    candidates = sorted(name for name in sizes if is_weights_name(name))
    weights = WEIGHTS_NAME if WEIGHTS_NAME in candidates else candidates[0] if len(candidates) == 1 else None
    if weights is None:
        shown = ", ".join((candidates or sorted(sizes))[:8])
        raise InvalidCheckpoint(
            f"there are several checkpoints ({shown}): name one of them"
            if candidates
            else f"there are no weights among {shown}: name the folder that has {WEIGHTS_NAME}"
        )
    names = [*(name for name in BESIDE if name in sizes), weights]
    for name in names:
        bound = BESIDE.get(name, most)
        if sizes[name] > bound:
            raise TooLarge(f"{name} has {sizes[name]} bytes, and an adapter's may have {bound}: it was not downloaded")
    return weights, names
