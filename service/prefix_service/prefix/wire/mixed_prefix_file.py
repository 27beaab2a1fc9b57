"""A mixed batch as a safetensors file, sent from the memory of its renderings."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, product
from typing import Final

import torch
from torch import Tensor

from prefix_service.prefix.buffers import bytes_of, memory_of
from prefix_service.prefix.mixed import Bytes, MixedBatch, RepeatedBytes, TensorBytes
from prefix_service.prefix.variant import FORMAT, Variant
from prefix_service.prefix.wire.masks import Extra
from prefix_service.prefix.wire.prefix_file import CHUNK, JOINED, TensorSpec, chunks_of, write_header
from prefix_service.prefix.wire.rendering import BufferName, Rendering, dtype_groups

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
    def _specs(self) -> list[tuple[TensorSpec, tuple[BufferName, range] | None]]:
        """The tensors in the order of the file; keys, values and scales with the buffer and its range of cells that
        they hold.
        """
        specs: list[tuple[TensorSpec, tuple[BufferName, range] | None]] = [
            (TensorSpec(name, extra.dtype, extra.shape), None) for name, extra in self.extras.items()
        ]
        rows, tokens = len(self.batch.rows), self.batch.num_virtual_tokens
        for group in dtype_groups(self.variant.dtypes):
            for source, dtype, suffix in group.buffers:
                width = 1 if suffix else self.batch.first.identity.head_dim
                if self.variant.layout == "stacked":
                    shape: tuple[int, ...] = (rows, self._layers, len(group.parts), self._heads, tokens, width)
                    cells = range(self._layers * len(group.parts))
                    specs.append((TensorSpec(f"past_key_values{suffix}", dtype, shape), (source, cells)))
                    continue
                for cell, (layer, part) in enumerate(product(range(*self.variant.layers), group.parts)):
                    name = f"past_key_values.{layer}.{('key', 'value')[part]}{suffix}"
                    spec = TensorSpec(name, dtype, (rows, self._heads, tokens, width))
                    specs.append((spec, (source, range(cell, cell + 1))))
        return sorted(specs, key=lambda spec: -spec[0].dtype.itemsize)

    @property
    def _layers(self) -> int:
        return self.variant.layers[1] - self.variant.layers[0]

    @cached_property
    def header(self) -> bytes:
        """Length and JSON header, padded."""
        identity = self.batch.first.identity
        about = {
            "format": FORMAT,
            "rows": [row.as_metadata() for row in self.batch.rows],
            "num_virtual_tokens": self.batch.num_virtual_tokens,
            "num_layers": identity.num_layers,
            "num_kv_heads": identity.num_kv_heads,
            "head_dim": identity.head_dim,
            **self.variant.as_metadata(),
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
        buffers = {
            name: [[_tokens_of(rendering, group.name, name) for rendering in row] for row in renderings]
            for group in dtype_groups(self.variant.dtypes)
            for name, _, _ in group.buffers
        }
        yield self.header
        for spec, held in self._specs:
            if held is None:
                yield from chunks_of(self.extras[spec.name].pieces())
            else:
                source, cells = held
                yield from self.batch.byte_runs(buffers[source], self._heads, cells)


def stacked(batch: MixedBatch, tensors: Sequence[Sequence[Tensor]], memory: memoryview) -> Tensor:
    """Writes a batch into `memory` of its size, and returns it as a tensor `[B, L', 2, H', N, D]` that shares the
    memory.

    `tensors` has one tensor `[L', 2, H', n, D]` per prefix, nested as in the batch's rows.
    """
    first = next(chain.from_iterable(tensors))
    layers, _, heads, _, head_dim = first.shape
    sources = [[_tensor_bytes(tensor.contiguous()) for tensor in row] for row in tensors]
    at = 0
    for run in batch.byte_runs(sources, heads, range(2 * layers)):
        memory[at : at + len(run)] = run
        at += len(run)
    shape = (len(batch.rows), layers, 2, heads, batch.num_virtual_tokens, head_dim)
    return memory_of(memory).view(first.dtype).view(shape)


def _tensor_bytes(tensor: Tensor) -> TensorBytes:
    *_, tokens, head_dim = tensor.shape
    return TensorBytes(bytes_of(tensor), tokens, head_dim * tensor.itemsize)


def _tokens_of(rendering: Rendering, group: BufferName, name: BufferName) -> TensorBytes:
    """Returns a buffer of a rendering, of keys and values or their scales; scales are repeated for all tokens of the
    `group` that they belong to.
    """
    *_, tokens, width = rendering.buffers[group].shape
    if name == group:
        return TensorBytes(rendering.bytes_of(name), tokens, width * rendering.buffers[group].itemsize)
    return RepeatedBytes(rendering.bytes_of(name), tokens, torch.float32.itemsize)
