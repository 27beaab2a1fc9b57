"""A mixed batch as a safetensors file, sent from the memory of its renderings."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Final

import torch
from torch import Tensor

from prefix_service.prefix.buffers import memory_of
from prefix_service.prefix.mixed import Bytes, MixedBatch, RepeatedBytes, TensorBytes
from prefix_service.prefix.variant import FORMAT, Variant
from prefix_service.prefix.wire.masks import Extra
from prefix_service.prefix.wire.prefix_file import CHUNK, JOINED, TensorSpec, chunks_of, write_header
from prefix_service.prefix.wire.rendering import KV_DTYPES, Rendering

_BLOCK: Final = 1 << 20  # bytes of short runs that are joined
_RUNS: Final = 1024  # short runs that are joined


@dataclass(frozen=True)
class MixedPrefixFile:
    """A response for a mixed batch, planned from sizes alone.

    `variant.batch_size` is the number of rows; `extras` are the masks. Float8 scales are one per token, float32 `[B,
    H', N, 1]` (stacked: `[B, L', 2, H', N, 1]`), so that the prefixes of a row keep their own scales and all bits.
    """

    batch: MixedBatch
    variant: Variant
    extras: Mapping[str, Extra]

    @property
    def _heads(self) -> int:
        return self.variant.kv_heads[1] - self.variant.kv_heads[0]

    @cached_property
    def _specs(self) -> list[tuple[TensorSpec, range | None]]:
        """The tensors in the order of the file; keys, values and scales with the range of cells that they hold."""
        specs: list[tuple[TensorSpec, range | None]] = [
            (TensorSpec(name, extra.dtype, extra.shape), None) for name, extra in self.extras.items()
        ]
        rows, tokens, cells = len(self.batch.rows), self.batch.num_virtual_tokens, 2 * self._layers
        parts = [("", KV_DTYPES[self.variant.dtype], self.batch.first.identity.head_dim)]
        if self.variant.dtype == "float8_e4m3fn":
            parts.append(("_scale", torch.float32, 1))
        for suffix, dtype, width in parts:
            if self.variant.layout == "stacked":
                shape: tuple[int, ...] = (rows, self._layers, 2, self._heads, tokens, width)
                specs.append((TensorSpec(f"past_key_values{suffix}", dtype, shape), range(cells)))
                continue
            for cell in range(cells):
                name = f"past_key_values.{self.variant.layers[0] + cell // 2}.{('key', 'value')[cell % 2]}{suffix}"
                specs.append((TensorSpec(name, dtype, (rows, self._heads, tokens, width)), range(cell, cell + 1)))
        return sorted(specs, key=lambda spec: -spec[0].dtype.itemsize)

    @property
    def _layers(self) -> int:
        return self.variant.layers[1] - self.variant.layers[0]

    @cached_property
    def header(self) -> bytes:
        """Length and JSON header, padded."""
        identity, variant = self.batch.first.identity, self.variant
        about = {
            "format": FORMAT,
            "rows": [row.as_metadata() for row in self.batch.rows],
            "num_virtual_tokens": self.batch.num_virtual_tokens,
            "num_layers": identity.num_layers,
            "num_kv_heads": identity.num_kv_heads,
            "head_dim": identity.head_dim,
            "dtype": variant.dtype,
            "batch_size": variant.batch_size,
            "layers": variant.layers,
            "kv_heads": variant.kv_heads,
            "layout": variant.layout,
            "expand": variant.expand,
        }
        return write_header(about, [spec for spec, _ in self._specs])

    @cached_property
    def content_length(self) -> int:
        """The size of the whole file in bytes."""
        return len(self.header) + sum(spec.nbytes for spec, _ in self._specs)

    def chunks(self, renderings: Sequence[Sequence[Rendering]]) -> Iterator[Bytes]:
        """Yields the file in order, in chunks of at most 8 MiB.

        `renderings` has one rendering per prefix, nested as in the batch's rows. Runs of 64 KiB and more are not
        copied; shorter ones are joined, at most a megabyte and 1024 runs at a time.
        """
        held: list[Bytes] = []
        size = 0
        for run in self._runs(renderings):
            if len(run) < JOINED:
                held.append(run)
                size += len(run)
            if held and (size >= _BLOCK or len(held) >= _RUNS or len(run) >= JOINED):
                yield b"".join(held)
                held, size = [], 0
            if len(run) >= JOINED:
                yield from (run[at : at + CHUNK] for at in range(0, len(run), CHUNK))
        if held:
            yield b"".join(held)

    def _runs(self, renderings: Sequence[Sequence[Rendering]]) -> Iterator[Bytes]:
        values = [[_values(rendering) for rendering in row] for row in renderings]
        scales = [[_scales(rendering) for rendering in row if rendering.scales is not None] for row in renderings]
        yield self.header
        for spec, cells in self._specs:
            if cells is None:
                yield from chunks_of(self.extras[spec.name].pieces())
            else:
                sources = scales if spec.name.endswith("_scale") else values
                yield from self.batch.byte_runs(sources, self._heads, cells)


def stacked(batch: MixedBatch, tensors: Sequence[Sequence[Tensor]], memory: memoryview) -> Tensor:
    """Writes a batch into `memory` of its size, and returns it as a tensor `[B, L', 2, H', N, D]` that shares the
    memory.

    `tensors` has one tensor `[L', 2, H', n, D]` per prefix, nested as in the batch's rows.
    """
    layers, _, heads, _, head_dim = next(chain.from_iterable(tensors)).shape
    sources = [[_values(Rendering(tensor.contiguous(), None)) for tensor in row] for row in tensors]
    at = 0
    for run in batch.byte_runs(sources, heads, range(2 * layers)):
        memory[at : at + len(run)] = run
        at += len(run)
    shape = (len(batch.rows), layers, 2, heads, batch.num_virtual_tokens, head_dim)
    return memory_of(memory).view(KV_DTYPES[batch.dtype]).view(shape)


def _values(rendering: Rendering) -> TensorBytes:
    *_, tokens, head_dim = rendering.values.shape
    return TensorBytes(rendering.bytes_of("values"), tokens, head_dim * rendering.values.itemsize)


def _scales(rendering: Rendering) -> TensorBytes:
    return RepeatedBytes(rendering.bytes_of("scales"), rendering.values.shape[3], torch.float32.itemsize)
