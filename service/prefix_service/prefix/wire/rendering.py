"""Keys and values in host memory, in the dtype in which they are sent."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import repeat
from math import prod
from typing import Final, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from prefix_service.prefix.buffers import bytes_of
from prefix_service.prefix.kv import PrefixKV
from prefix_service.prefix.streams import own_stream
from prefix_service.prefix.variant import DtypePair, KVDtype

KV_DTYPES: Final[Mapping[KVDtype, torch.dtype]] = {name: getattr(torch, name) for name in get_args(KVDtype)}
BufferName = Literal["key_value", "key_value_scale", "key", "key_scale", "value", "value_scale"]
"""The buffers of a rendering by name: one for keys and values in one dtype, else one for each."""
_FLOAT8_MAX: Final = 448.0  # the largest float8_e4m3fn
_BLOCK: Final = 1 << 18
"""Values that are scaled at a time: a processor's cache holds them in float32."""


class DtypeGroup(NamedTuple):
    """Keys, values, or both, in one dtype: the names of their buffer and of that of their scales, which float8 alone
    has. `parts` are the places in a layer: 0 of keys, 1 of values.
    """

    name: BufferName
    scale_name: BufferName
    kind: KVDtype
    parts: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of keys and values."""
        return KV_DTYPES[self.kind]

    @property
    def is_scaled(self) -> bool:
        """Whether keys and values have scales."""
        return self.kind == "float8_e4m3fn"

    @property
    def buffers(self) -> list[tuple[BufferName, torch.dtype, str]]:
        """Name and dtype of each buffer, and what follows the names of its tensors in a file."""
        scales: tuple[BufferName, torch.dtype, str] = self.scale_name, torch.float32, "_scale"
        return [(self.name, self.dtype, ""), *([scales] if self.is_scaled else [])]


def dtype_groups(dtypes: DtypePair) -> list[DtypeGroup]:
    """Returns one group of keys and values if they have one dtype, else one of each."""
    if dtypes.single is not None:
        return [DtypeGroup("key_value", "key_value_scale", dtypes.single, (0, 1))]
    return [DtypeGroup("key", "key_scale", dtypes.key, (0,)), DtypeGroup("value", "value_scale", dtypes.value, (1,))]


@dataclass(frozen=True)
class Rendering:
    """Keys and values as they are sent, in host memory.

    A buffer of keys and values is `[L', P, H', N, D]`, where P is 2 if it holds both, else 1; that of the scales of
    float8 is float32 `[L', P, H', 1, 1]`.
    """

    buffers: Mapping[BufferName, Tensor]
    file: str | None = None
    """The path of the file that holds the buffers, if other processes on this host can map it."""

    @property
    def nbytes(self) -> int:
        """The size in host memory, in bytes."""
        return sum(buffer.nbytes for buffer in self.buffers.values())

    def bytes_of(self, buffer: BufferName) -> memoryview:
        """Returns the memory of a buffer."""
        return self._memory[buffer]

    @cached_property
    def _memory(self) -> Mapping[BufferName, memoryview]:
        return {name: bytes_of(buffer) for name, buffer in self.buffers.items()}


def render(kv: PrefixKV, dtypes: DtypePair) -> Rendering:
    """Casts a prefix on its device, and copies it once to pinned host memory. On the CPU there is no copy if both
    dtypes stay the same. Renderings of several threads run in parallel.

    float8 values are divided by a scale per layer and head, `max |x| / 448`, which is sent with them. The scale is at
    least the smallest normal float32, so that heads of zeros or of subnormals can be divided too.
    """
    with own_stream(kv.tensor.device):
        buffers: dict[BufferName, Tensor] = {}
        for group in dtype_groups(dtypes):
            part = kv.tensor[:, group.parts[0] : group.parts[-1] + 1]  # (L', P, H', N, D)
            if group.is_scaled:
                part, scales = _scaled(part)
                buffers[group.scale_name] = to_host(scales)
            buffers[group.name] = to_host(part.to(group.dtype))
        return Rendering(buffers)


def _scaled(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Returns values in float8, and their scales; a block at a time, since float32 takes four times the memory."""
    values = torch.empty(tensor.shape, dtype=torch.float8_e4m3fn, device=tensor.device)
    scales = torch.empty((*tensor.shape[:3], 1, 1), dtype=torch.float32, device=tensor.device)
    for part, scale, value in zip(*map(_blocks, (tensor, scales, values), repeat(tensor.shape)), strict=True):
        exact = part.to(torch.float32)
        largest = exact.abs().amax(dim=(3, 4), keepdim=True)  # (layers, P, heads, 1, 1)
        scale.copy_((largest / _FLOAT8_MAX).clamp_(min=torch.finfo(torch.float32).tiny))
        value.copy_((exact / scale).clamp_(-_FLOAT8_MAX, _FLOAT8_MAX))
    return values, scales


def _blocks(tensor: Tensor, shape: torch.Size) -> Iterator[Tensor]:
    """Yields views of some layers and heads, which have up to `_BLOCK` values where keys and values have this shape, or
    are one head of one layer."""
    _, parts, heads, *row = shape
    together = max(_BLOCK // (parts * prod(row)), 1)  # heads, of one layer or of several
    for layers in torch.split(tensor, max(together // heads, 1)):
        yield from torch.split(layers, min(together, heads), dim=2)


def to_host(tensor: Tensor) -> Tensor:
    """Returns the contiguous values in host memory. From a device the memory is pinned, and is filled once the work of
    the current stream is done.
    """
    tensor = tensor.contiguous()
    if tensor.device.type == "cpu":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
