"""What a client received: a safetensors file of this service, read in the memory that it arrived in."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, get_type_hints

import torch
from torch import Tensor

from service.errors import InvalidCheckpoint, InvalidResponse
from service.prefix.buffers import memory_of
from service.prefix.form import FORMAT, Identity, Span
from service.prefix.kv import PrefixKV
from service.prefix.safetensors_header import DTYPES, TensorEntry, parse_header

_IDENTITY: Final = get_type_hints(Identity)
_REMEMBERED: Final = 4096  # bytes of a header that is read once: twice what a stacked prefix has


@dataclass(frozen=True, slots=True)
class Received:
    """A message that was read: its metadata and its tensors, which share the memory that was read into."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def read_message(data: bytearray | memoryview) -> Received:
    """Read a response of the service; nothing is copied.

    Raises:
        InvalidResponse: not a sound safetensors file, or not one of this service.
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
    """Tensors and metadata of a message of `size` bytes that begins with `start`."""
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
    """The same of a header that is short: reading it takes longer than half a megabyte on the wire."""
    return _read_header(memoryview(start), size)


def _tensor_in(memory: Tensor, entry: TensorEntry) -> Tensor:
    """A view, but of what is not aligned to its dtype, which this service never sends: a copy."""
    dtype, part = DTYPES[entry.dtype], memory[entry.start : entry.stop]
    return (part.clone() if entry.start % dtype.itemsize else part).view(dtype).view(entry.shape)


def read_kv(received: Received) -> PrefixKV:
    """The keys and values of a message in the layout `stacked` and one row; float8 comes back as float32.

    Raises:
        InvalidResponse: the tensor is missing, or its shape contradicts the metadata.
    """
    about = received.metadata
    for name, kind in _IDENTITY.items():
        if not isinstance(about.get(name, ...), kind):
            raise InvalidResponse(f"the metadata of the answer say {about.get(name)!r:.80} where {name} should be")
    tensor = received.tensors.get("past_key_values")
    try:
        layers, heads = _span(about["layers"]), _span(about["kv_heads"])
        num_layers, num_kv_heads = int(about["num_layers"]), int(about["num_kv_heads"])
        expected = (1, layers[1] - layers[0], 2, heads[1] - heads[0], about["num_virtual_tokens"], about["head_dim"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise InvalidResponse(f"the metadata of the answer is not that of a prefix: {error!r:.80}") from error
    if tensor is None or tuple(tensor.shape) != expected:
        found = "none" if tensor is None else list(tensor.shape)
        raise InvalidResponse(f"past_key_values should have shape {list(expected)}, got {found}")
    if (scale := received.tensors.get("past_key_values_scale")) is not None:
        if tuple(scale.shape) != (*expected[:4], 1, 1):
            raise InvalidResponse(f"past_key_values_scale has shape {list(scale.shape)}, beside {list(expected)}")
        tensor = tensor.to(torch.float32) * scale
    return PrefixKV(tensor[0], layers, heads, num_layers, num_kv_heads)


def _span(values: Any) -> Span:
    first, last = values
    return int(first), int(last)
