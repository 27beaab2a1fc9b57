"""Parses a safetensors file of this service in the memory in which a client received it."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any, Final

import torch
from torch import Tensor

from prefix_service.errors import InvalidCheckpoint, InvalidResponse
from prefix_service.prefix.buffers import memory_of
from prefix_service.prefix.kv import PrefixKV
from prefix_service.prefix.safetensors_header import TensorEntry, parse_header
from prefix_service.prefix.safetensors_tensors import DTYPES
from prefix_service.prefix.variant import FORMAT, Variant
from prefix_service.prefix.wire.metadata import read_metadata
from prefix_service.prefix.wire.rendering import DtypeGroup, dtype_groups

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
    """Returns the keys and values of a file with one row, `[L', 2, H', N, D]`, in one dtype.

    One tensor shares the memory of the file. Otherwise memory comes from `allocate`, for a number of bytes (default:
    torch's): float8 is decoded to float32 as `value * scale`, tensors of several layers are joined, and keys and values
    of two dtypes become float32, which represents all of their numbers.

    Raises:
        InvalidResponse: the metadata is not that of a prefix, or the tensors do not have its shapes and dtypes.
    """
    identity, variant = read_metadata(received.metadata)
    layers, heads = (last - first for first, last in (variant.layers, variant.kv_heads))
    if variant.rows != 1:
        raise InvalidResponse(f"the answer has {variant.rows} rows, where one row was expected")
    if variant.layout == "stacked" and variant.dtypes.single is None:
        raise InvalidResponse("the answer has the layout stacked, and two dtypes")
    if variant.layout == "layers" and len(received.tensors) <= 2 * layers:  # before their names are made
        raise InvalidResponse(f"the answer has {len(received.tensors)} tensors, too few for {layers} layers")
    named = list(_named(variant))
    tail = identity.num_virtual_tokens, identity.head_dim
    lead = (1, layers, 2, heads) if variant.layout == "stacked" else (1, heads)
    expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "attention_mask": (torch.int64, (variant.batch_size, identity.num_virtual_tokens))
    }
    for name, group, _ in named:
        expected[name] = group.dtype, (*lead, *tail)
        if group.is_scaled:
            expected[f"{name}_scale"] = torch.float32, (*lead, 1, 1)
    _require(received.tensors, expected)
    groups = dtype_groups(variant.dtypes)
    if variant.layout == "stacked" and not groups[0].is_scaled:
        tensor = received.tensors["past_key_values"][0]
    else:
        dtype = torch.float32 if len(groups) > 1 or groups[0].is_scaled else groups[0].dtype
        tensor = _allocated((layers, 2, heads, *tail), dtype, allocate)
        for name, group, place in named:
            part = tensor[place].copy_(received.tensors[name][0])
            if group.is_scaled:
                part.mul_(received.tensors[f"{name}_scale"][0])
    return PrefixKV(tensor, variant.layers, variant.kv_heads, identity.num_layers, identity.num_kv_heads)


def _named(variant: Variant) -> Iterator[tuple[str, DtypeGroup, tuple[int, ...]]]:
    """Yields the name of each tensor of keys, values or both, its group, and its place in a tensor `[L', 2, …]`."""
    for group in dtype_groups(variant.dtypes):
        if variant.layout == "stacked":
            yield "past_key_values", group, ()
            continue
        for number, layer in enumerate(range(*variant.layers)):
            for part in group.parts:
                yield f"past_key_values.{layer}.{('key', 'value')[part]}", group, (number, part)


def _allocated(shape: tuple[int, ...], dtype: torch.dtype, allocate: Callable[[int], memoryview] | None) -> Tensor:
    size = prod(shape) * dtype.itemsize
    flat = torch.empty(size, dtype=torch.uint8) if allocate is None else memory_of(allocate(size))
    return flat.view(dtype).view(shape)


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
