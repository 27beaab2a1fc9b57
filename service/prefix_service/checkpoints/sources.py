"""Checkpoints on their owner's machine: finds the weights in a folder, reads them lazily, and cuts the prefix out."""

import io
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, TypeVar

from prefix_service.errors import InvalidCheckpoint, InvalidConfig, InvalidInput, InvalidRequest, UnsafeCheckpoint
from prefix_service.prefix.config import config_type_of
from prefix_service.prefix.description import check_annotations
from prefix_service.prefix.file_names import (
    BASE_MODEL_NAME,
    CARD_NAME,
    CONFIG_NAME,
    PICKLE_SUFFIXES,
    RECIPE_NAME,
    WEIGHTS_NAME,
)
from prefix_service.prefix.fingerprint import NO_FINGERPRINT, Fingerprint
from prefix_service.prefix.json_text import MAX_CONFIG_BYTES, parse_config_json, parse_json
from prefix_service.prefix.layouts import CHECKPOINT_LAYOUTS, Match, Shape, find_prefix
from prefix_service.prefix.safetensors_header import (
    WEIGHT_DTYPES,
    Header,
    TensorEntry,
    header_bytes,
    header_length,
    parse_checkpoint_header,
    require_dtype,
    shown_name,
)

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

_NO_WEIGHTS: Final = frozenset({"training_args", "optimizer", "scheduler", "pytorch_model_head", "model_head"})
"""Stems of files that trainers, and AdapterHub's prediction heads, leave beside the weights."""

_ORDER: Final = ("F32", "BF16", "F16")
"""The order in which the safetensors library writes tensors of these dtypes, each by name."""


@dataclass(frozen=True, slots=True)
class Upload:
    """The files of an upload.

    `cut_from` describes which tensors of which layout were cut out of a larger checkpoint; None if the file is sent as
    it is. `card` is the model card, or None. `recipe` has the annotations by which `compile` describes its result,
    `base_model` the fingerprint of the model that it compiled with.
    """

    config: bytes
    weights: BinaryIO
    size: int
    cut_from: str | None
    card: bytes | None
    recipe: Mapping[str, str]
    base_model: Fingerprint = NO_FINGERPRINT


@dataclass(frozen=True, slots=True)
class TensorFiles:
    """The tensors of one or several safetensors files by name; each is read when it is asked for."""

    shapes: Mapping[str, Shape]
    _entries: Mapping[str, tuple[Path, TensorEntry]]

    @classmethod
    def open(cls, paths: list[Path]) -> "TensorFiles":
        """Reads the headers of the files.

        Raises:
            InvalidCheckpoint: a file cannot be read, is not a sound safetensors file, or repeats a name of another
            file.
            UnsafeCheckpoint: a file is a pickle.
        """
        entries: dict[str, tuple[Path, TensorEntry]] = {}
        for path in paths:
            for name, entry in _header(path).tensors.items():
                if name in entries:
                    raise InvalidCheckpoint(f"{entries[name][0]} and {path} both hold {shown_name(name)}")
                entries[name] = path, entry
        return cls({name: entry.shape for name, (_, entry) in entries.items()}, entries)

    def tensor(self, name: str) -> "Tensor":
        """Returns one tensor of the prefix.

        Raises:
            InvalidCheckpoint: the tensor is not float32, float16 or bfloat16, or the file has become shorter.
        """
        from prefix_service.prefix.safetensors_tensors import tensor_at

        entry, data = self.data(name)
        return tensor_at(memoryview(data), replace(entry, start=0, stop=len(data)))

    def data(self, name: str) -> tuple[TensorEntry, bytearray]:
        """Returns the entry of one tensor of the prefix, and its bytes.

        Raises:
            InvalidCheckpoint: as `tensor` does.
        """
        path, entry = self._entries[name]
        require_dtype(name, entry, WEIGHT_DTYPES)
        with readable(path), path.open("rb") as file:
            file.seek(entry.start)
            data = bytearray(file.read(entry.stop - entry.start))
        if len(data) != entry.stop - entry.start:
            raise InvalidCheckpoint(f"{path} ends inside of {shown_name(name)}")
        return entry, data


def _header(path: Path) -> Header:
    with readable(path), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(9)
        try:
            length = header_length(memoryview(start), size)
            return parse_checkpoint_header(memoryview(start + file.read(8 + length - len(start))), size=size)
        except InvalidCheckpoint as error:
            raise type(error)(f"{path}: {error}") from error


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Raises InvalidCheckpoint if the block cannot read the file or folder `path`."""
    try:
        yield
    except OSError as error:
        raise InvalidCheckpoint(f"{path} cannot be read: {error.strerror}") from error


def prepare_upload(source: Path, config: Path | None = None) -> Upload:
    """Returns the upload of an adapter's folder, or of a full training checkpoint, whose prefix is cut out.

    Files that `save_pretrained` wrote are sent byte for byte, with a task head if they have one, and with the folder's
    README.md as the model card, its prefix_recipe.json as annotations and its prefix_base_model.json as the fingerprint
    of its base model.

    Raises:
        InvalidConfig: there is no adapter_config.json, or it belongs to another kind of adapter, such as LORA.
        UnsafeCheckpoint: all weights are pickles.
        InvalidCheckpoint: there are no weights, or none or several prefixes among them, or a file cannot be read.
        InvalidRequest: the recipe is no object of texts, the fingerprint is none, or one of them is too large.
    """
    folder = source if source.is_dir() else source.parent
    config_path = config or folder / CONFIG_NAME
    if not config_path.is_file():
        raise InvalidConfig(f"there is no {config_path}, the adapter's config, which PEFT writes beside the weights")
    with readable(config_path):
        config_json = config_path.read_bytes()
    config_type_of(parse_config_json(config_json, str(config_path)))
    paths = weight_files(source)
    files = TensorFiles.open(paths)
    match = find_prefix(files.shapes)
    others = len(files.shapes) - len(match.tensors)
    card_path = folder / CARD_NAME
    with readable(card_path):
        card = card_path.read_bytes() if source.is_dir() and card_path.is_file() else None
    recipe: Mapping[str, str] = {}
    base_model = NO_FINGERPRINT
    if source.is_dir():
        recipe = _beside(folder / RECIPE_NAME, "recipe", check_annotations) or {}
        base_model = _beside(folder / BASE_MODEL_NAME, "fingerprint", Fingerprint.of) or NO_FINGERPRINT
    if len(paths) == 1 and (not others or match.layout is CHECKPOINT_LAYOUTS[0]):
        with readable(paths[0]):
            return Upload(config_json, paths[0].open("rb"), paths[0].stat().st_size, None, card, recipe, base_model)
    weights = _cut(files, match)
    what = f"{len(match.tensors)} of {len(files.shapes)} tensors ({match.layout.name})"
    return Upload(config_json, io.BytesIO(weights), len(weights), what, card, recipe, base_model)


def _beside(path: Path, what: str, check: Callable[[Any], T]) -> T | None:
    """Returns the checked JSON object in a file beside the weights; None if there is no such file."""
    with readable(path):
        if not path.is_file():
            return None
        with path.open("rb") as file:
            data = file.read(MAX_CONFIG_BYTES + 1)
    try:
        return check(parse_json(data, "it"))
    except InvalidInput as error:
        raise InvalidRequest(f"{path} is no {what}: {error}") from error


def _cut(files: TensorFiles, match: Match) -> bytes:
    """Returns a safetensors file of the tensors of a prefix alone, by their names in the checkpoint.

    The safetensors library, which needs torch, would write the same bytes.
    """
    read = {name: files.data(name) for name in match.tensors.values()}
    order = sorted(read, key=lambda name: (_ORDER.index(read[name][0].dtype), name))
    header = header_bytes({name: read[name][0] for name in order})
    return b"".join([header, *(read[name][1] for name in order)])


def is_weights_name(name: str) -> bool:
    """Returns whether a file of this name may hold an adapter's weights."""
    path = Path(name)
    if path.stem in _NO_WEIGHTS:
        return False
    return path.suffix == ".safetensors" or (path.suffix in PICKLE_SUFFIXES and "rng" not in path.stem)


def weight_files(source: Path) -> list[Path]:
    """Returns the safetensors files that hold the weights: the adapter's own, else every shard of a full checkpoint.

    Raises:
        UnsafeCheckpoint: all weights are pickles.
        InvalidCheckpoint: there are no weights.
    """
    if source.is_dir():
        own = source / WEIGHTS_NAME
        with readable(source):
            found = (
                [own] if own.exists() else sorted(p for p in source.glob("*.safetensors") if is_weights_name(p.name))
            )
            pickles = sorted(path for path in source.iterdir() if path.suffix in PICKLE_SUFFIXES)
    else:
        found = [source] if source.suffix == ".safetensors" else []
        pickles = [source] if source.suffix in PICKLE_SUFFIXES else []
    if found:
        return found
    if pickles:
        raise UnsafeCheckpoint(
            f"{pickles[0]} is a pickle, which the service never opens: run `prefix-service convert {source} <folder>` "
            "first, where you trust the file"
        )
    raise InvalidCheckpoint(f"there are no weights in {source}: expected {WEIGHTS_NAME}")
