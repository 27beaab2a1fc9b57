"""Tensors of a safetensors file: their dtypes, one tensor from bytes, and the header of a file with one tensor.

`safetensors_header` is a module of its own so that code that only reads headers does not import torch.
"""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Final

import torch

from prefix_service.prefix.safetensors_header import TensorEntry, header_bytes

DTYPES: Final[Mapping[str, torch.dtype]] = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "BOOL": torch.bool,
}
"""Every dtype that this project reads or writes, by the name that safetensors gives it."""

NAMES: Final[Mapping[torch.dtype, str]] = {dtype: name for name, dtype in DTYPES.items()}


def tensor_at(data: memoryview, entry: TensorEntry) -> torch.Tensor:
    """Returns the tensor that `entry` describes. It shares the memory of `data`, which must be writable."""
    dtype, count = DTYPES[entry.dtype], prod(entry.shape)
    if not count:  # `frombuffer` refuses a count of zero
        return torch.empty(entry.shape, dtype=dtype)
    flat = torch.frombuffer(data, dtype=dtype, count=count, offset=entry.start)
    return flat.view(entry.shape)


def header_of(name: str, dtype: torch.dtype, shape: Sequence[int]) -> bytes:
    """Returns length and header of a file with one tensor, whose bytes follow; the safetensors library writes the
    same bytes."""
    return header_bytes({name: TensorEntry(NAMES[dtype], tuple(shape), 0, prod(shape) * dtype.itemsize)})
