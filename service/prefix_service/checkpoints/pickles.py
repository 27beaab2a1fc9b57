"""Reads the tensors of a pickled checkpoint, on its owner's machine.

Opening a pickle can run code, so it happens only where the owner asks for it, and never in the service: first with
`torch.load(weights_only=True)`, then with torch's own containers allowed too, and only on request without restriction
(CVE-2025-32434). Objects from a pickle are foreign, and a damaged pickle can fail anywhere: only this module touches
them, and only plain tensors leave it.
"""

import io
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import torch
from torch import Tensor, nn

from prefix_service.errors import InvalidCheckpoint, PrefixServiceError, UnsafeCheckpoint
from prefix_service.prefix.layouts import shown_names
from prefix_service.prefix.safetensors_header import WEIGHT_DTYPES, require_name, shown_name
from prefix_service.prefix.safetensors_tensors import NAMES

# Keys under which training frameworks store a state dict: Lightning, accelerate and torch recipes, DeepSpeed.
_CONTAINERS: Final = ("state_dict", "model_state_dict", "model", "module")
_SAFE_CONTAINERS: Final[list[Callable[..., Any] | tuple[Callable[..., Any], str]]] = [
    nn.ParameterList,
    nn.ParameterDict,
]
_PLAIN: Final = (str, bytes, int, float, complex, bool, type(None), torch.dtype, torch.device, torch.Size)
# Python's own unpickler: the one in C fills 64 GiB with zeros if a damaged byte makes it memoise object 2^32.
_UNRESTRICTED: Final[Any] = SimpleNamespace(
    __name__="pickle", Unpickler=pickle.__dict__["_Unpickler"], load=pickle.__dict__["_load"]
)
_LFS_POINTER: Final = b"version https://git-lfs"
_ANSI: Final = re.compile(r"\x1b\[[0-9;]*m")
_CHUNK: Final = 1 << 20  # bytes
_MAX_DEPTH: Final = 32
_MAX_VALUES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Pickled:
    """A pickled checkpoint: how it was opened, its tensors by dotted name, and the names of objects of other kinds.

    `scope` is the prefix of the state dict's names if a training framework wrapped the state dict, else empty.
    """

    opened: str
    scope: str
    tensors: Mapping[str, Tensor]
    objects: list[str]

    def tensor(self, name: str) -> Tensor:
        """Returns a contiguous copy of a tensor.

        Raises:
            InvalidCheckpoint: the tensor is not plain, not of float32, float16 or bfloat16, or repeats its values.
        """
        tensor, shown = self.tensors[name], shown_name(name)
        require_name(name)
        if type(tensor) is not Tensor or tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise InvalidCheckpoint(
                f"{shown} is a {type(tensor).__name__} of layout {tensor.layout}, not a plain tensor"
            )
        if NAMES.get(tensor.dtype) not in WEIGHT_DTYPES:
            raise InvalidCheckpoint(
                f"{shown} has dtype {str(tensor.dtype).removeprefix('torch.')}, and a prefix is float32, float16 or "
                "bfloat16"
            )
        # A few damaged bytes can make a view that repeats its memory a million times.
        if tensor.nbytes > tensor.untyped_storage().nbytes():
            raise InvalidCheckpoint(f"{shown} of shape {list(tensor.shape)} repeats the values of a smaller tensor")
        return tensor.clone(memory_format=torch.contiguous_format)


def read_pickle(path: Path, *, unsafe: bool) -> Pickled:
    """Opens a pickle with the strictest method that works, and collects its tensors.

    Raises:
        UnsafeCheckpoint: the pickle needs more than tensors and torch's containers, and `unsafe` is false.
        InvalidCheckpoint: the pickle is damaged, or is not a mapping.
    """
    _check_file(path)
    opened, state = _opened(path, unsafe=unsafe)
    with _damage_of(path):
        state = state.state_dict() if isinstance(state, nn.Module) else state
        if not isinstance(state, Mapping):
            raise InvalidCheckpoint(f"{path} holds a {type(state).__name__}, not a state dict")
        found = _Collected()
        found.add("", state, 0)
        return Pickled(opened, _scope(state), found.tensors, found.objects)


def _check_file(path: Path) -> None:
    """Raises InvalidCheckpoint if the file was not written by torch.save, or its checksums show damage."""
    with _damage_of(path):
        if not zipfile.is_zipfile(path):
            with path.open("rb") as file:
                start = file.read(len(_LFS_POINTER))
            if start == _LFS_POINTER:
                raise InvalidCheckpoint(f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull`")
            if not start.startswith(pickle.PROTO):
                raise InvalidCheckpoint(f"{path} was not written by torch.save")
            return
        with zipfile.ZipFile(path) as archive:
            members, size = archive.infolist(), path.stat().st_size
            unpacked = sum(member.file_size for member in members)
            # torch.load would read a few packed bytes, or bytes that many members share, into gigabytes of memory.
            if unpacked > size:
                raise InvalidCheckpoint(
                    f"{path} has {size} bytes and unpacks to {unpacked}: torch.save does not compress, so save it again"
                )
            # torch.load does not compare the checksums of a zip's members.
            for member in members:
                if not member.CRC:  # torch.save writes 0 if it is configured to compute none
                    continue
                with archive.open(member) as content:
                    while content.read(_CHUNK):
                        pass


def _opened(path: Path, *, unsafe: bool) -> tuple[str, Any]:
    try:
        return "torch.load with weights_only=True: tensors alone", _load(path, weights_only=True)
    except pickle.UnpicklingError:
        pass
    try:
        with torch.serialization.safe_globals(_SAFE_CONTAINERS):
            return "torch.load with weights_only=True and torch.nn's parameter containers", _load(
                path, weights_only=True
            )
    except pickle.UnpicklingError as error:
        if not unsafe:
            raise UnsafeCheckpoint(
                f"{path} needs more than tensors ({_first_line(error)}): if you trust who wrote it, --unsafe opens it "
                "without restriction, and it may then run code"
            ) from error
    try:
        state = _load(path, weights_only=False)
    except pickle.UnpicklingError as error:
        raise InvalidCheckpoint(f"{path} cannot be read by torch.load: {_first_line(error)}") from error
    return "torch.load WITHOUT restriction, as --unsafe asked: it may have run code", state


def _load(path: Path, *, weights_only: bool) -> Any:
    module = None if weights_only else _UNRESTRICTED
    # The warnings are about pickle protocols, which either work or fail.
    with _damage_of(path), warnings.catch_warnings(action="ignore"), _BoundedReader(io.FileIO(path)) as file:
        return torch.load(file, map_location="cpu", pickle_module=module, weights_only=weights_only)


class _BoundedReader(io.BufferedReader):
    """A file that never allocates more than it holds; a damaged pickle can ask Python to read gigabytes."""

    def read(self, size: int | None = -1, /) -> bytes:
        """Returns at most `size` bytes, fewer at the end of the file."""
        left = max(os.fstat(self.fileno()).st_size - self.tell(), 0)
        return super().read(left if size is None or size < 0 else min(size, left))


@contextmanager
def _damage_of(path: Path) -> Iterator[None]:
    try:
        yield
    except (PrefixServiceError, pickle.UnpicklingError):
        raise
    except Exception as error:  # a damaged pickle raises whatever its objects raise
        raise InvalidCheckpoint(f"{path} cannot be read by torch.load: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    text = _ANSI.sub("", str(error))
    if blocked := re.search(r"(?:GLOBAL|global) (\S+) was not an allowed global", text):
        return f"it names {blocked[1]:.100}"
    line = next(iter(text.splitlines()), "")
    printable = "".join(character if character.isprintable() else "?" for character in line)
    return f"{type(error).__name__}: {printable:.200}" if printable else type(error).__name__


def _scope(state: Mapping[Any, Any]) -> str:
    inner = next((name for name in _CONTAINERS if isinstance(state.get(name), Mapping)), None)
    return "" if inner is None else f"{inner}.{_scope(state[inner])}"


@dataclass(slots=True)
class _Collected:
    """Tensors by dotted name, and the names of objects in which tensors may be hidden."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    objects: list[str] = field(default_factory=list)
    seen: int = 0

    def add(self, name: str, value: Any, depth: int) -> None:
        """Collects the tensors in `value`, under names that begin with `name`.

        Raises:
            InvalidCheckpoint: two tensors have the same name, or there are too many values, or too deeply nested ones.
        """
        self.seen += 1
        if depth > _MAX_DEPTH or self.seen > _MAX_VALUES:
            raise InvalidCheckpoint(f"the checkpoint has more than {_MAX_DEPTH} levels or {_MAX_VALUES} values")
        if isinstance(value, Tensor):
            if name in self.tensors:
                raise InvalidCheckpoint(f"the checkpoint holds two tensors named {shown_names([name])}")
            self.tensors[name] = value.detach()
            return
        if isinstance(value, nn.Module):
            value = value.state_dict()
        if isinstance(value, Mapping):
            children = value.items()
        elif isinstance(value, list | tuple | set | frozenset):
            children = dict(enumerate(value)).items()
        else:
            if not isinstance(value, _PLAIN):
                self.objects.append(f"{name} ({type(value).__name__})")
            return
        for key, child in children:
            self.add(f"{name}.{key}" if name else str(key), child, depth + 1)
