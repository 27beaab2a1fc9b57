"""Reads the tensors of a prefix encoder from a trained checkpoint, a safetensors file.

This module opens no pickle, and allocates nothing before names, shapes and dtypes have been compared with the config.
It imports torch only when it reads a tensor, since finding a prefix needs none.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from prefix_service.errors import InvalidCheckpoint
from prefix_service.prefix.config import PrefixConfig
from prefix_service.prefix.layouts import CheckpointLayout, check_shapes, find_prefix, shown_names
from prefix_service.prefix.safetensors_header import (
    WEIGHT_DTYPES,
    TensorEntry,
    header_length,
    parse_checkpoint_header,
    require_dtype,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ReadBytes = Callable[[int, int], memoryview]
"""Returns the bytes `start:stop` of a file, in new memory that may be written to."""

BLOCK: Final = 16 << 20
"""Bytes of a prefix that are read at a time when the whole need not be in memory."""


@dataclass(frozen=True, slots=True)
class LocatedPrefix:
    """A prefix located in a safetensors file: the position of each role's tensor.

    The tensors fit the config; none has been read.
    """

    layout: CheckpointLayout
    names: Mapping[str, str]
    entries: Mapping[str, TensorEntry]

    @property
    def nbytes(self) -> int:
        """The size of the tensors in bytes."""
        return sum(entry.stop - entry.start for entry in self.entries.values())

    @property
    def dtype(self) -> "torch.dtype":
        """The dtype of the tensors; float32 if they differ."""
        import torch

        from prefix_service.prefix.safetensors_tensors import DTYPES

        dtypes = {DTYPES[entry.dtype] for entry in self.entries.values()}
        return dtypes.pop() if len(dtypes) == 1 else torch.float32

    @property
    def is_projected(self) -> bool:
        """Whether an MLP computes the prefix from these tensors."""
        return "transform.w1" in self.entries

    @property
    def encoded_dtype(self) -> "torch.dtype":
        """The dtype of the keys and values: float32 if an MLP computes them, else the stored dtype."""
        import torch

        return torch.float32 if self.is_projected else self.dtype


@dataclass(frozen=True, slots=True)
class PrefixWeights:
    """The validated tensors of a prefix encoder, by the role names of `prefix_service.prefix.encoder`.

    Matrices are `[out, in]`. `dtype` is the dtype in which they were stored.
    """

    layout: str
    dtype: "torch.dtype"
    tensors: "Mapping[str, Tensor]"


def header_nbytes(read: ReadBytes, size: int) -> int:
    """Returns the size of the header of a safetensors file that has `size` bytes.

    Raises:
        UnsafeCheckpoint: the file begins like a pickle or a zip archive.
        InvalidCheckpoint: the file does not begin with the length of a safetensors header.
    """
    return header_length(read(0, min(size, 9)), size)


def locate_prefix(read: ReadBytes, size: int, config: PrefixConfig) -> LocatedPrefix:
    """Returns the position of the prefix in a safetensors file of `size` bytes; reads the header alone.

    Raises:
        UnsafeCheckpoint: the file is a pickle or a zip archive.
        InvalidCheckpoint: the prefix is malformed, incomplete, ambiguous, or does not fit the config.
        InvalidConfig: the config lacks dimensions.
    """
    config.require_dimensions()
    header = parse_checkpoint_header(read(0, min(size, 8 + header_nbytes(read, size))), size=size)
    match = find_prefix({name: entry.shape for name, entry in header.tensors.items()})
    for name in match.tensors.values():
        require_dtype(name, header.tensors[name], WEIGHT_DTYPES)
    check_shapes(match, config, lambda name: header.tensors[name].shape)
    return LocatedPrefix(
        match.layout, match.tensors, {role: header.tensors[name] for role, name in match.tensors.items()}
    )


def read_weights(file: LocatedPrefix, read: ReadBytes) -> PrefixWeights:
    """Returns the tensors of a prefix; reads no other part of its file.

    Raises:
        InvalidCheckpoint: a value is not finite.
    """
    tensors = {}
    for role, entry in file.entries.items():
        tensor = _read(read, entry, file.names[role], 0, entry.shape[0])
        if not file.layout.linear and role in ("transform.w1", "transform.w2"):
            tensor = tensor.T.contiguous()  # [in, out] -> [out, in]
        tensors[role] = tensor
    return PrefixWeights(file.layout.name, file.dtype, tensors)


def read_rows(file: LocatedPrefix, read: ReadBytes) -> "Iterator[Tensor]":
    """Yields the rows `[n, L * 2 * token_dim]` of a prefix without an MLP, about 16 MiB at a time.

    Raises:
        InvalidCheckpoint: a value is not finite.
    """
    for role in ("prompt_embeddings", "embedding", "frozen_embedding", "trainable_embedding"):
        if (entry := file.entries.get(role)) is None:
            continue
        step = max(1, BLOCK // max(1, (entry.stop - entry.start) // max(1, entry.shape[0])))
        for first in range(0, entry.shape[0], step):
            yield _read(read, entry, file.names[role], first, min(entry.shape[0], first + step))


def _read(read: ReadBytes, entry: TensorEntry, name: str, first: int, last: int) -> "Tensor":
    """Returns the rows `first:last` of a tensor; all rows have the same number of bytes."""
    from prefix_service.prefix.safetensors_tensors import tensor_at

    row = (entry.stop - entry.start) // max(1, entry.shape[0])
    nbytes = row * (last - first)
    part = TensorEntry(entry.dtype, (last - first, *entry.shape[1:]), 0, nbytes)
    start = entry.start + row * first
    tensor = tensor_at(read(start, start + nbytes), part)
    # The extremes are NaN if any value is, and computing them allocates nothing.
    if tensor.numel() and not all(bool(extreme.isfinite()) for extreme in tensor.aminmax()):
        raise InvalidCheckpoint(f"{shown_names([name])} holds NaN or infinite values")
    return tensor


def load_weights(data: bytearray | memoryview, config: PrefixConfig) -> PrefixWeights:
    """Returns the weights of a prefix from the bytes of a safetensors file; the tensors share the memory of `data`.

    Raises:
        UnsafeCheckpoint: the file is a pickle or a zip archive.
        InvalidCheckpoint: the prefix is malformed, incomplete, ambiguous, not finite, or does not fit the config.
        InvalidConfig: the config lacks dimensions.
    """
    view = memoryview(data)

    def read(start: int, stop: int) -> memoryview:
        return view[start:stop]

    return read_weights(locate_prefix(read, len(view), config), read)
