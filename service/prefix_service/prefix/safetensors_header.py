"""Reads and validates a safetensors header before anything that it describes is touched or allocated.

The format: 8 bytes little-endian length, a JSON header, tensor data (https://github.com/huggingface/safetensors). The
library (0.8) accepts duplicate keys, hostile names and millions of tensors; this module does not.

A checkpoint may hold tensors that are not part of the prefix: a task head with its counters, flags and empty buffers.
`parse_checkpoint_header` therefore accepts every dtype and size of the format and checks that the tensors tile the
file; `parse_header` accepts only the dtypes that its caller reads, and no empty tensor.
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Final, NoReturn

from prefix_service.errors import InvalidCheckpoint, UnsafeCheckpoint
from prefix_service.prefix.json_text import shown

MAX_HEADER_BYTES: Final = 8 << 20
MAX_TENSORS: Final = 65_536
_MAX_RANK: Final = 64  # torch's own limit
_MAX_NAME: Final = 1 << 16
_MOST_DIGITS: Final = 20  # of an unsigned number of 64 bits
_SHORT: Final = 64 << 10  # bytes of a header that is parsed without a call into Python for each number

# A tensor is an object with two lists and three members; ten commas are enough for a rank of six, and most have two.
_MOST_CONTAINERS: Final = 3 * MAX_TENSORS + 2
_MOST_COLONS: Final = 4 * MAX_TENSORS
_MOST_COMMAS: Final = 10 * MAX_TENSORS
_LENGTH: Final = struct.Struct("<Q")
_PICKLES: Final = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # torch's zip, and bare pickles

# Trained weights are one of these; a key or value of another kind is a mistake or an attack.
WEIGHT_DTYPES: Final = frozenset({"F32", "F16", "BF16"})

# Every dtype of the format, with the bits of one element.
_BITS: Final[Mapping[str, int]] = (
    dict.fromkeys(("F4",), 4)
    | dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6)
    | dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8)
    | dict.fromkeys(("U16", "I16", "F16", "BF16"), 16)
    | dict.fromkeys(("U32", "I32", "F32"), 32)
    | dict.fromkeys(("U64", "I64", "F64", "C64"), 64)
)


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file; `start` and `stop` are byte offsets from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Header:
    """A valid header: the tensors by name, the metadata, and the size of the file in bytes."""

    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]
    size: int


def header_bytes(tensors: Mapping[str, TensorEntry]) -> bytes:
    """Returns length and header of a file whose tensors follow, in this order and without gaps; the offsets of the
    entries do not count. The safetensors library writes the same bytes."""
    fields, first = {}, 0
    for name, entry in tensors.items():
        last = first + entry.stop - entry.start
        fields[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [first, last]}
        first = last
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return _LENGTH.pack(len(text)) + text


def parse_header(
    data: memoryview, *, dtypes: frozenset[str], size: int | None = None, longest: int = MAX_HEADER_BYTES
) -> Header:
    """Returns the header at the beginning of `data`, of a file whose every tensor has one of these `dtypes`.

    The file has `size` bytes (default: all of `data`), its header at most `longest`.

    Raises:
        UnsafeCheckpoint: the bytes are a pickle or a zip archive.
        InvalidCheckpoint: the bytes are not a sound safetensors file of non-empty tensors of these `dtypes`.
    """
    header = parse_checkpoint_header(data, size=size, longest=longest)
    for name, entry in header.tensors.items():
        require_dtype(name, entry, dtypes)
        if 0 in entry.shape:
            raise InvalidCheckpoint(f"tensor {shown_name(name)} of shape {list(entry.shape)} is empty")
    return header


def parse_checkpoint_header(data: memoryview, *, size: int | None = None, longest: int = MAX_HEADER_BYTES) -> Header:
    """Returns the header at the beginning of `data`, of a file that may hold any tensors of the format.

    The file has `size` bytes (default: all of `data`), its header at most `longest`.

    Raises:
        UnsafeCheckpoint: the bytes are a pickle or a zip archive.
        InvalidCheckpoint: the bytes are not a sound safetensors file.
    """
    total = len(data) if size is None else size
    length = header_length(data, total, longest)
    if 8 + length > len(data):
        raise InvalidCheckpoint(
            f"the safetensors header claims {length} bytes, and {len(data)} of the file have arrived"
        )
    values = _header_json(bytes(data[8 : 8 + length]))
    metadata = values.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata  # some writers put null
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InvalidCheckpoint("__metadata__ of the safetensors header must map strings to strings")
    if not values:
        raise InvalidCheckpoint("the safetensors file holds no tensors")
    if len(values) > MAX_TENSORS:
        raise InvalidCheckpoint(f"the safetensors file holds {len(values)} tensors, more than {MAX_TENSORS}")
    tensors = {name: _entry(name, value, 8 + length) for name, value in values.items()}
    _require_gapless(tensors, 8 + length, total)
    return Header(tensors, metadata, total)


def require_dtype(name: str, entry: TensorEntry, dtypes: frozenset[str]) -> None:
    """Raises InvalidCheckpoint if the tensor's dtype is not one of `dtypes`."""
    if entry.dtype not in dtypes:
        raise InvalidCheckpoint(
            f"tensor {shown_name(name)} has dtype {entry.dtype!r}, not one of {', '.join(sorted(dtypes))}"
        )


def require_name(name: str) -> None:
    """Raises InvalidCheckpoint if a tensor's name is empty, unprintable,
    longer than 64 Ki characters, or contains `..`.
    """
    # No file is ever named after a tensor, so "/" and "\\" are harmless (a module may be named so). Control characters
    # and ".." stay refused: no training framework writes them, and names are shown on terminals.
    if not name or len(name) > _MAX_NAME or not name.isprintable() or ".." in name:
        raise InvalidCheckpoint(f"tensor name {shown_name(name)} is not acceptable")


def shown_name(name: str) -> str:
    """Returns a tensor's name for an error message: quoted, control characters escaped, at most 80 characters."""
    text = repr(name)
    return text if len(text) <= 80 else text[:76] + "...'"


def header_length(data: memoryview, total: int, longest: int = MAX_HEADER_BYTES) -> int:
    """Returns the length of the JSON header, from at least the first nine bytes of a file of `total` bytes.

    Raises:
        UnsafeCheckpoint: the bytes are a pickle or a zip archive.
        InvalidCheckpoint: the length is missing, or exceeds the file or the limit.
    """
    # A header of 640 bytes begins like a pickle, but no pickle has a '{' behind its first eight bytes.
    if bytes(data[:4]).startswith(_PICKLES) and bytes(data[8:9]) != b"{":
        raise UnsafeCheckpoint(
            "the weights are a pickle, which is never opened here: turn them into safetensors on your own machine "
            "with `prefix-service convert`"
        )
    if total < 8 or len(data) < 8:
        raise InvalidCheckpoint(f"the weights file has {total} bytes, too few for a safetensors header")
    (length,) = _LENGTH.unpack(data[:8])
    if length > longest:
        raise InvalidCheckpoint(f"the safetensors header claims {length} bytes, more than {longest}")
    if 8 + length > total:
        raise InvalidCheckpoint(f"the safetensors header claims {length} bytes, and the file has {total}")
    return int(length)


def _header_json(header: bytes) -> dict[str, Any]:
    # Counted before anything is made of the text: Python's lock is held while it is parsed.
    containers = header.count(b"[") + header.count(b"{")
    if containers > _MOST_CONTAINERS or header.count(b",") > _MOST_COMMAS or header.count(b":") > _MOST_COLONS:
        raise InvalidCheckpoint(
            f"the safetensors header has more lists, objects or members than {MAX_TENSORS} tensors have"
        )
    try:
        values = json.loads(
            header.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_int=int if len(header) <= _SHORT else _integer,
            parse_float=_refuse_number,
            parse_constant=_refuse_number,
        )
    except (ValueError, RecursionError) as error:
        raise InvalidCheckpoint(f"the safetensors header is not usable JSON: {error!s:.200}") from error
    if not isinstance(values, dict):
        raise InvalidCheckpoint("the safetensors header must be a JSON object")
    return values


def _integer(text: str) -> int:
    if len(text) > _MOST_DIGITS:
        raise ValueError(f"{text[:_MOST_DIGITS]}… has {len(text)} digits")
    return int(text)


def _refuse_number(text: str) -> NoReturn:
    raise ValueError(f"{shown(text)} is no integer")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("duplicate keys")
    return found


def _entry(name: str, value: Any, data_start: int) -> TensorEntry:
    require_name(name)
    named = shown_name(name)
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise InvalidCheckpoint(f"tensor {named} must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise InvalidCheckpoint(f"tensor {named} has dtype {shown(dtype, 40)}, not one of {', '.join(_BITS)}")
    if not _are_sizes(shape) or len(shape) > _MAX_RANK:
        raise InvalidCheckpoint(f"tensor {named} has shape {shown(shape)}, not up to {_MAX_RANK} sizes")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise InvalidCheckpoint(f"tensor {named} has data_offsets {shown(offsets)}, not two byte positions")
    expected, rest = divmod(prod(shape) * _BITS[dtype], 8)
    if rest or offsets[1] - offsets[0] != expected:
        raise InvalidCheckpoint(
            f"tensor {named} of shape {shape} and dtype {dtype} needs {expected} bytes, "
            f"its offsets span {offsets[1] - offsets[0]}"
        )
    return TensorEntry(dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 1 << 62 for size in value)


def _require_gapless(tensors: Mapping[str, TensorEntry], start: int, total: int) -> None:
    position = start
    # An empty tensor begins where its successor begins, so the end decides their order.
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != position:
            raise InvalidCheckpoint(
                f"tensor {shown_name(name)} begins at byte {entry.start}, not {position}: overlap or hole"
            )
        position = entry.stop
    if position != total:
        raise InvalidCheckpoint(f"the tensors end at byte {position}, and the file has {total}: truncated or trailing")
