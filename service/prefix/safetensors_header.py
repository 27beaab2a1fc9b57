"""A safetensors header, read and validated before anything that it describes is touched or allocated.

The format: 8 bytes little-endian length, a JSON header, tensor data (https://github.com/huggingface/safetensors).
The library (0.8) accepts duplicate keys, hostile names, zero-sized and million-fold tensors; this does not.
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Final

import torch

from service.errors import InvalidCheckpoint, UnsafeCheckpoint

MAX_HEADER_BYTES: Final = 8 << 20
MAX_TENSORS: Final = 65_536
_MAX_RANK: Final = 8
_MAX_NAME: Final = 512
_LENGTH: Final = struct.Struct("<Q")
_PICKLES: Final = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # torch's zip, and bare ones

DTYPES: Final[Mapping[str, torch.dtype]] = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "BOOL": torch.bool,
}
"""Every dtype that this project reads or writes, under the name that safetensors gives it."""

NAMES: Final[Mapping[torch.dtype, str]] = {dtype: name for name, dtype in DTYPES.items()}

# Trained weights are one of these; a key or value of another kind is a mistake or an attack.
WEIGHT_DTYPES: Final = frozenset({"F32", "F16", "BF16"})


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of the header: `start` and `stop` are byte offsets from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Header:
    """A valid header: its tensors by name, its metadata, and the bytes of the file."""

    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]
    size: int


def parse_header(data: memoryview, *, dtypes: frozenset[str], size: int | None = None) -> Header:
    """The header at the beginning of `data`, where the file has `size` bytes (default: all of `data`).

    Raises:
        UnsafeCheckpoint: the bytes are a pickle or a zip archive.
        InvalidCheckpoint: anything else that is not a sound safetensors file of tensors of these `dtypes`.
    """
    total = len(data) if size is None else size
    length = _header_length(data, total)
    values = _header_json(bytes(data[8 : 8 + length]))
    metadata = values.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InvalidCheckpoint("__metadata__ of the safetensors header must map strings to strings")
    if not values:
        raise InvalidCheckpoint("the safetensors file holds no tensors")
    if len(values) > MAX_TENSORS:
        raise InvalidCheckpoint(f"the safetensors file holds {len(values)} tensors, more than {MAX_TENSORS}")
    tensors = {name: _entry(name, value, dtypes, 8 + length) for name, value in values.items()}
    _require_gapless(tensors, 8 + length, total)
    return Header(tensors, metadata, total)


def tensor_at(data: memoryview, entry: TensorEntry) -> torch.Tensor:
    """The tensor that `entry` describes, sharing the memory of `data`, which must be writable."""
    dtype = DTYPES[entry.dtype]
    flat = torch.frombuffer(data, dtype=dtype, count=prod(entry.shape), offset=entry.start)
    return flat.view(entry.shape)


def _header_length(data: memoryview, total: int) -> int:
    # A header of 640 bytes begins like a pickle too, but a pickle has no '{' behind eight bytes of length.
    if bytes(data[:4]).startswith(_PICKLES) and bytes(data[8:9]) != b"{":
        raise UnsafeCheckpoint(
            "the weights are a pickle, which is never opened here: turn them into safetensors on your own machine "
            "with `prefix-service convert`"
        )
    if total < 8 or len(data) < 8:
        raise InvalidCheckpoint(f"the weights file has {total} bytes, too few for a safetensors header")
    (length,) = _LENGTH.unpack(data[:8])
    if length > MAX_HEADER_BYTES:
        raise InvalidCheckpoint(f"the safetensors header claims {length} bytes, more than {MAX_HEADER_BYTES}")
    if 8 + length > total or 8 + length > len(data):
        raise InvalidCheckpoint(f"the safetensors header claims {length} bytes, and the file has {total}")
    return int(length)


def _header_json(header: bytes) -> dict[str, Any]:
    try:
        values = json.loads(header.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise InvalidCheckpoint(f"the safetensors header is not usable JSON: {error!s:.200}") from error
    if not isinstance(values, dict):
        raise InvalidCheckpoint("the safetensors header must be a JSON object")
    return values


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("duplicate keys")
    return found


def _entry(name: str, value: Any, dtypes: frozenset[str], data_start: int) -> TensorEntry:
    if not name or len(name) > _MAX_NAME or not name.isprintable() or ".." in name or "/" in name or "\\" in name:
        raise InvalidCheckpoint(f"tensor name {name[:40]!r} is not acceptable")
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise InvalidCheckpoint(f"tensor {name!r} must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in dtypes:
        raise InvalidCheckpoint(f"tensor {name!r} has dtype {dtype!r:.40}, not one of {', '.join(sorted(dtypes))}")
    if not _are_sizes(shape, least=1) or len(shape) > _MAX_RANK:
        raise InvalidCheckpoint(f"tensor {name!r} has shape {shape!r:.80}, not up to {_MAX_RANK} positive sizes")
    if not _are_sizes(offsets, least=0) or len(offsets) != 2:
        raise InvalidCheckpoint(f"tensor {name!r} has data_offsets {offsets!r:.80}, not two byte positions")
    expected = prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != expected:
        raise InvalidCheckpoint(
            f"tensor {name!r} of shape {shape} and dtype {dtype} needs {expected} bytes, "
            f"its offsets span {offsets[1] - offsets[0]}"
        )
    return TensorEntry(dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _are_sizes(value: Any, *, least: int) -> bool:
    return isinstance(value, list) and all(type(size) is int and least <= size < 1 << 62 for size in value)


def _require_gapless(tensors: Mapping[str, TensorEntry], start: int, total: int) -> None:
    position = start
    for name, entry in sorted(tensors.items(), key=lambda item: item[1].start):
        if entry.start != position:
            raise InvalidCheckpoint(f"tensor {name!r} begins at byte {entry.start}, not {position}: overlap or hole")
        position = entry.stop
    if position != total:
        raise InvalidCheckpoint(f"the tensors end at byte {position}, and the file has {total}: truncated or trailing")
