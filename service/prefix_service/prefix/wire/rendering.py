"""Keys and values in host memory, in the dtype in which they are sent."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import repeat
from math import prod
from typing import Final, Literal, get_args

import torch
from torch import Tensor

from prefix_service.prefix.buffers import bytes_of
from prefix_service.prefix.kv import PrefixKV
from prefix_service.prefix.streams import own_stream
from prefix_service.prefix.variant import KVDtype

KV_DTYPES: Final[Mapping[KVDtype, torch.dtype]] = {name: getattr(torch, name) for name in get_args(KVDtype)}
BufferName = Literal["values", "scales"]
"""The buffers of a rendering by name."""
_FLOAT8_MAX: Final = 448.0  # the largest float8_e4m3fn
_BLOCK: Final = 1 << 18
"""Values that are scaled at a time: a processor's cache holds them in float32."""


@dataclass(frozen=True)
class Rendering:
    """Keys and values as they are sent, in host memory.

    `values` is `[L', 2, H', N, D]`; for float8 `scales` is float32 `[L', 2, H', 1, 1]`.
    """

    values: Tensor
    scales: Tensor | None
    file: str | None = None
    """The path of the file that holds the buffers, if other processes on this host can map it."""

    @property
    def nbytes(self) -> int:
        """The size in host memory, in bytes."""
        return self.values.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def bytes_of(self, buffer: BufferName) -> memoryview:
        """Returns the memory of `values` or `scales`."""
        return self._values_bytes if buffer == "values" else self._scales_bytes

    @cached_property
    def _values_bytes(self) -> memoryview:
        return bytes_of(self.values)

    @cached_property
    def _scales_bytes(self) -> memoryview:
        if self.scales is None:
            raise AssertionError("a float8 file needs a float8 rendering")
        return bytes_of(self.scales)


def render(kv: PrefixKV, dtype: KVDtype) -> Rendering:
    """Casts a prefix on its device, and copies it once to pinned host memory. On the CPU there is no copy if the dtype
    stays the same. Renderings of several threads run in parallel.

    float8 values are divided by a scale per layer and head, `max |x| / 448`, which is sent with them. The scale is at
    least the smallest normal float32, so that heads of zeros or of subnormals can be divided too.
    """
    with own_stream(kv.tensor.device):
        if dtype == "float8_e4m3fn":
            values, scales = _scaled(kv.tensor)
            return Rendering(to_host(values), to_host(scales))
        return Rendering(to_host(kv.tensor.to(dtype=KV_DTYPES[dtype])), None)


def _scaled(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Returns values in float8, and their scales; a block at a time, since float32 takes four times the memory."""
    values = torch.empty(tensor.shape, dtype=torch.float8_e4m3fn, device=tensor.device)
    scales = torch.empty((*tensor.shape[:3], 1, 1), dtype=torch.float32, device=tensor.device)
    for part, scale, value in zip(*map(_blocks, (tensor, scales, values), repeat(tensor.shape)), strict=True):
        exact = part.to(torch.float32)
        largest = exact.abs().amax(dim=(3, 4), keepdim=True)  # (layers, 2, heads, 1, 1)
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
