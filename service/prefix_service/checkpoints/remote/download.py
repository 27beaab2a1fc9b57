"""Downloads an adapter from wherever its address leads, and makes it a folder that can be published."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from prefix_service.checkpoints.remote.address import Address
from prefix_service.prefix.file_names import CARD_NAME, CONFIG_NAME, PICKLE_SUFFIXES
from prefix_service.prefix.json_text import parse_config_json
from prefix_service.system.disk import translated


@dataclass(frozen=True, slots=True)
class Downloaded:
    """An adapter's folder, the annotations that say where it comes from, and how it was converted, if it was."""

    folder: Path
    annotations: dict[str, str]
    converted: str | None


@contextlib.contextmanager
def downloaded(
    address: Address, most: int, *, config: Path | None = None, base_config: Path | None = None
) -> Iterator[Downloaded]:
    """Yields the folder of an adapter, in a temporary folder that the end of the block removes.

    Weights of at most `most` bytes are downloaded. A pickle, and a layout that is not PEFT's, is converted as `convert`
    does, with `config` and `base_config`; a pickle that needs more than tensors is refused.

    Raises:
        NotFound, Unauthenticated, Forbidden: the address leads to nothing, or not for these credentials.
        InvalidCheckpoint, InvalidConfig, UnsafeCheckpoint, TooLarge: it is no adapter, or too large.
        InvalidRequest, InvalidResponse, ConnectionFailed: the other side refused, sent something else than it
            announced, or did not answer.
        ModuleNotFoundError: the library of the address's scheme is not installed.
    """
    with tempfile.TemporaryDirectory(prefix="prefix-service-") as scratch:
        with translated(f"write the files of {address}"):
            folder = Path(scratch, "downloaded")
            folder.mkdir()
            weights, annotations = _download(address, folder, most)
            if config is not None:
                shutil.copyfile(config, folder / CONFIG_NAME)
        if weights.suffix not in PICKLE_SUFFIXES and _is_pefts(folder / CONFIG_NAME):
            yield Downloaded(folder, annotations, None)
        else:
            safe = Path(scratch, "converted")
            yield Downloaded(safe, annotations, _convert(weights, base_config, safe))


def _convert(weights: Path, base_config: Path | None, safe: Path) -> str:
    """Writes the folder of a converted adapter; returns what was found."""
    from prefix_service.checkpoints.convert import convert, write

    conversion = convert(weights, base_config=base_config)
    write(conversion, safe)
    card = weights.with_name(CARD_NAME)
    if card.exists():
        with translated(f"write {safe / CARD_NAME}"):
            shutil.copyfile(card, safe / CARD_NAME)
    return conversion.found


def _download(address: Address, folder: Path, most: int) -> tuple[Path, dict[str, str]]:
    match address.scheme:
        case "hf":
            from prefix_service.checkpoints.remote.hugging_face import download
        case "s3":
            from prefix_service.checkpoints.remote.s3 import download
        case _:
            from prefix_service.checkpoints.remote.oci import download
    return download(address, folder, most)


def _is_pefts(config: Path) -> bool:
    """Returns whether there is a config, and PEFT wrote it."""
    return config.exists() and "peft_type" in parse_config_json(config.read_bytes(), CONFIG_NAME)
