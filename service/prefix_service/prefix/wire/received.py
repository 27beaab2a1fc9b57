"""Parses a safetensors file of this service in the memory in which a client received it."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import torch
from torch import Tensor

from prefix_service.errors import InvalidCheckpoint, InvalidResponse
from prefix_service.prefix.buffers import memory_of
from prefix_service.prefix.kv import PrefixKV
from prefix_service.prefix.safetensors_header import TensorEntry, parse_header
from prefix_service.prefix.safetensors_tensors import DTYPES
from prefix_service.prefix.variant import FORMAT
from prefix_service.prefix.wire.metadata import read_metadata

_REMEMBERED: Final = 4096  # bytes of a header that is cached once parsed: twice the header of a stacked prefix


@dataclass(frozen=True, slots=True)
class Received:
    """A parsed prefix file: its metadata, and its tensors, which share the memory of the file."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def read_prefix_file(data: bytearray | memoryview) -> Received:
    """Parses a response of the service without a copy.

    Raises:
        InvalidResponse: the data is not a sound safetensors file, or not one of this service.
    """
    view = memoryview(data)
    stop = 8 + int.from_bytes(view[:8], "little")
    if stop <= min(len(view), _REMEMBERED):
        tensors, metadata = _remembered(bytes(view[:stop]), len(view))
    else:
        tensors, metadata = _read_header(view, len(view))
    memory = memory_of(view)
    return Received(dict(metadata), {name: _tensor_in(memory, entry) for name, entry in tensors.items()})


def _read_header(start: memoryview, size: int) -> tuple[Mapping[str, TensorEntry], dict[str, Any]]:
    """Returns tensors and metadata of a file of `size` bytes that begins with `start`.

    Raises:
        InvalidResponse: the file is not a prefix in a format that this client reads.
    """
    try:
        header = parse_header(start, dtypes=frozenset(DTYPES), size=size)
        metadata = json.loads(header.metadata.get("prefix", "null"))
    except (InvalidCheckpoint, ValueError, RecursionError) as error:
        raise InvalidResponse(f"the answer is not a prefix: {error}") from error
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise InvalidResponse("the answer is a safetensors file, but not a prefix in a format that this client reads")
    return header.tensors, metadata


@lru_cache(maxsize=256)
def _remembered(start: bytes, size: int) -> tuple[Mapping[str, TensorEntry], dict[str, Any]]:
    """Parses a short header once, since parsing it takes longer than transferring half a megabyte."""
    return _read_header(memoryview(start), size)


def _tensor_in(memory: Tensor, entry: TensorEntry) -> Tensor:
    """Returns a tensor of the file as a view.

    A tensor that is not aligned to its dtype is copied; this service sends none.
    """
    dtype, part = DTYPES[entry.dtype], memory[entry.start : entry.stop]
    return (part.clone() if entry.start % dtype.itemsize else part).view(dtype).view(entry.shape)


def read_kv(received: Received, allocate: Callable[[int], memoryview] | None = None) -> PrefixKV:
    """Returns the keys and values of a file in the layout `stacked` with one row, `[L', 2, H', N, D]`.

    They share the memory of the file, except float8, which is decoded to float32 as `value * scale`, in memory that
    `allocate` returns for a number of bytes (default: torch's).

    Raises:
        InvalidResponse: the metadata is not that of a prefix, or the tensors do not have its shapes and dtypes.
    """
    identity, variant = read_metadata(received.metadata)
    if variant.layout != "stacked" or variant.rows != 1:
        raise InvalidResponse(
            f"the answer has layout {variant.layout} and {variant.rows} rows, where layout stacked and one row was "
            "expected"
        )
    layers, heads = (last - first for first, last in (variant.layers, variant.kv_heads))
    shape = (1, layers, 2, heads, identity.num_virtual_tokens, identity.head_dim)
    expected = {
        "past_key_values": (getattr(torch, variant.dtype), shape),
        "attention_mask": (torch.int64, (variant.batch_size, identity.num_virtual_tokens)),
    }
    if variant.dtype == "float8_e4m3fn":
        expected["past_key_values_scale"] = (torch.float32, (*shape[:4], 1, 1))
    _require(received.tensors, expected)
    tensor = received.tensors["past_key_values"][0]
    if variant.dtype == "float8_e4m3fn":
        tensor = _decoded(tensor, received.tensors["past_key_values_scale"][0], allocate)
    return PrefixKV(tensor, variant.layers, variant.kv_heads, identity.num_layers, identity.num_kv_heads)


def _require(tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
    for name in sorted(expected.keys() | tensors.keys()):
        tensor, wanted = tensors.get(name), expected.get(name)
        found = None if tensor is None else (tensor.dtype, tuple(tensor.shape))
        if found != wanted:
            raise InvalidResponse(
                f"the tensor {name} of the answer should be {_described(wanted)}, got {_described(found)}"
            )


def _described(tensor: tuple[torch.dtype, tuple[int, ...]] | None) -> str:
    return "none" if tensor is None else f"{str(tensor[0]).removeprefix('torch.')} {list(tensor[1])}"


def _decoded(values: Tensor, scales: Tensor, allocate: Callable[[int], memoryview] | None) -> Tensor:
    size = values.numel() * torch.float32.itemsize
    flat = torch.empty(size, dtype=torch.uint8) if allocate is None else memory_of(allocate(size))
    return flat.view(torch.float32).view(values.shape).copy_(values).mul_(scales)
