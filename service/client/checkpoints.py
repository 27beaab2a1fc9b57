"""Checkpoints on their owner's machine: what there is in a folder, read lazily, and the prefix cut out of it."""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from service.errors import InvalidCheckpoint, InvalidConfig, UnsafeCheckpoint
from service.prefix.checkpoint import LAYOUTS, Match, Shape, find_prefix

CONFIG_NAME: Final = "adapter_config.json"
WEIGHTS_NAME: Final = "adapter_model.safetensors"
PICKLES: Final = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True, slots=True)
class Upload:
    """What is sent to the service: the config, the weights, and what was cut out of which files, if anything was."""

    config: bytes
    weights: BinaryIO
    size: int
    cut_from: str | None


@dataclass(frozen=True, slots=True)
class TensorFiles:
    """The tensors of one or several safetensors files, by name; none is read before it is asked for."""

    shapes: Mapping[str, Shape]
    _files: Mapping[str, Path]

    @classmethod
    def open(cls, paths: list[Path]) -> "TensorFiles":
        """Read the headers.

        Raises:
            InvalidCheckpoint: a file is no safetensors file.
        """
        shapes: dict[str, Shape] = {}
        files: dict[str, Path] = {}
        for path in paths:
            try:
                with safe_open(path, framework="pt") as file:
                    names = file.keys()
                    shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in names}
                    files |= dict.fromkeys(names, path)
            except SafetensorError as error:
                raise InvalidCheckpoint(f"{path} is no safetensors file: {error}") from error
        return cls(shapes, files)

    def tensor(self, name: str) -> Tensor:
        """One tensor."""
        with safe_open(self._files[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor


def prepare_upload(source: Path, config: Path | None = None) -> Upload:
    """The upload of an adapter's folder, or of a full training checkpoint's, whose prefix is cut out.

    What `save_pretrained` wrote goes as it is, byte for byte, with the task head that may stand beside the prefix.

    Raises:
        InvalidConfig: there is no adapter_config.json.
        UnsafeCheckpoint: there are only pickles.
        InvalidCheckpoint: there are no weights, or no one prefix among them.
    """
    folder = source if source.is_dir() else source.parent
    config_path = config or folder / CONFIG_NAME
    if not config_path.is_file():
        raise InvalidConfig(f"there is no {config_path}: name the adapter's config with --config")
    paths = weight_files(source)
    files = TensorFiles.open(paths)
    match = find_prefix(files.shapes)
    others = len(files.shapes) - len(match.tensors)
    if len(paths) == 1 and (not others or match.layout is LAYOUTS[0]):
        return Upload(config_path.read_bytes(), paths[0].open("rb"), paths[0].stat().st_size, None)
    weights = save(cut(files, match))
    what = f"{len(match.tensors)} of {len(files.shapes)} tensors ({match.layout.name})"
    return Upload(config_path.read_bytes(), io.BytesIO(weights), len(weights), what)


def cut(files: TensorFiles, match: Match) -> dict[str, Tensor]:
    """The tensors of a prefix alone, under the names that they have."""
    return {name: files.tensor(name) for name in match.tensors.values()}


def weight_files(source: Path) -> list[Path]:
    """The safetensors files that hold the weights: the adapter's own, else every shard of a full checkpoint.

    Raises:
        UnsafeCheckpoint: there are only pickles.
        InvalidCheckpoint: there are none at all.
    """
    if source.is_dir():
        own = source / WEIGHTS_NAME
        found = [own] if own.exists() else sorted(source.glob("*.safetensors"))
        pickles = sorted(path for path in source.iterdir() if path.suffix in PICKLES)
    else:
        found = [source] if source.suffix == ".safetensors" else []
        pickles = [source] if source.suffix in PICKLES else []
    if found:
        return found
    if pickles:
        raise UnsafeCheckpoint(
            f"{pickles[0]} is a pickle, which the service never opens: run `prefix-service convert {source} <folder>` "
            "first, where you trust the file"
        )
    raise InvalidCheckpoint(f"there are no weights in {source}: expected {WEIGHTS_NAME}")
