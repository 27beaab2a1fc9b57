"""One batch for many adapters: the rows of one forward pass of a base model, each behind a prefix of its own.

Prefixes of several lengths stand at the right end of `[…, N, D]`, N being the longest: in front of shorter ones there
are zeros, and the mask is 0 there. A row may have several prefixes, one behind the other, or none. Here it is said
which bytes lie where; nothing is copied, so that the service sends them and a client writes them into memory of its
own.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any, Final

import torch
from torch import Tensor

from prefix_service.errors import InvalidRequest
from prefix_service.prefix.buffers import bytes_of
from prefix_service.prefix.variant import Identity, KVDtype

MOST_IN_A_ROW: Final = 32
"""Prefixes that one row may be made of."""

_JOINED: Final = 1 << 18  # bytes of short lines that are made together
_MANY: Final = 16  # of them, from which on it is faster than one by one
_ZEROS: Final = memoryview(bytes(1 << 20))

Bytes = bytes | memoryview


@dataclass(frozen=True, slots=True)
class RowPrefix:
    """A prefix in a row: how it was asked for, which one it is, and the dtype that it has unless another is asked."""

    ref: str
    identity: Identity
    dtype: KVDtype
    is_encoder_decoder: bool = False

    @property
    def shape(self) -> tuple[int, int, int, bool]:
        """What the prefixes of one base model have in common."""
        identity = self.identity
        return identity.num_layers, identity.num_kv_heads, identity.head_dim, self.is_encoder_decoder

    def as_metadata(self) -> dict[str, Any]:
        """As metadata."""
        about = {name: getattr(self.identity, name) for name in ("version", "digest", "num_virtual_tokens")}
        return {"ref": self.ref, **about}

    def __str__(self) -> str:
        layers, heads, head_dim, is_encoder_decoder = self.shape
        kind = ", for an encoder-decoder model" if is_encoder_decoder else ""
        return f"{self.ref} has {layers} layers and {heads} key/value heads of size {head_dim}{kind}"


@dataclass(frozen=True, slots=True)
class Row:
    """The prefixes of a row, in their order; none where it has no prefix. `is_list` tells how it was asked for."""

    prefixes: tuple[RowPrefix, ...] = ()
    is_list: bool = False

    @property
    def num_virtual_tokens(self) -> int:
        """Tokens of its prefixes together."""
        return sum(prefix.identity.num_virtual_tokens for prefix in self.prefixes)

    def as_metadata(self) -> Any:
        """As metadata: of a prefix `ref`, `version`, `digest` and `num_virtual_tokens`; a list; or None."""
        told = [prefix.as_metadata() for prefix in self.prefixes]
        return told if self.is_list else told[0] if told else None


@dataclass(frozen=True)
class MixedBatch:
    """Rows that agree, in one dtype."""

    rows: tuple[Row, ...]
    dtype: KVDtype

    @classmethod
    def of(cls, rows: Sequence[Row], dtype: KVDtype | None = None) -> "MixedBatch":
        """Check rows against each other.

        Raises:
            InvalidRequest: no row has a prefix; one differs from the first in layers, heads or head size; or stored
                dtypes differ and no `dtype` was asked for.
        """
        found = [(index, prefix) for index, row in enumerate(rows) for prefix in row.prefixes]
        if not found:
            raise InvalidRequest("no row has a prefix: ask for a batch only where one has")
        first_index, first = found[0]
        for index, prefix in found:
            if prefix.shape != first.shape:
                raise InvalidRequest(
                    f"row {index}: {prefix}, but row {first_index}: {first}; the rows of a batch share one base model"
                )
            if dtype is None and prefix.dtype != first.dtype:
                raise InvalidRequest(
                    f"row {index}: {prefix.ref} is stored as {prefix.dtype}, but row {first_index}: {first.ref} as "
                    f"{first.dtype}; say in dtype which one is wanted"
                )
        return cls(tuple(rows), dtype or first.dtype)

    @cached_property
    def first(self) -> RowPrefix:
        """The first prefix; the others agree with it."""
        return next(chain.from_iterable(row.prefixes for row in self.rows))

    @cached_property
    def num_virtual_tokens(self) -> int:
        """N, that of the longest row."""
        return max(row.num_virtual_tokens for row in self.rows)

    @cached_property
    def lengths(self) -> Tensor:
        """Virtual tokens of each row, int64 `[B, 1]`."""
        return torch.tensor([[row.num_virtual_tokens] for row in self.rows])

    def byte_runs(self, sources: Sequence[Sequence["TensorBytes"]], heads: int, cells: range) -> Iterator[Bytes]:
        """The bytes of `cells` (a layer's keys are one, its values the next), row by row, head by head, in order.

        `sources` has the tensor of each prefix, as `rows` has them; the runs are tensors of these, and zeros.
        """
        width = next(source.width for source in chain.from_iterable(sources))
        for row, tensors in zip(self.rows, sources, strict=True):
            padding = self.num_virtual_tokens - row.num_virtual_tokens
            if len(tensors) == 1 and not padding:
                yield from tensors[0].cell_bytes(cells, heads)
                continue
            if not tensors:
                yield from _zeros(len(cells) * heads * padding * width)
                continue
            first, last = cells.start * heads, cells.stop * heads
            for start, stop in _blocks(first, last, self.num_virtual_tokens * width):
                if stop - start > 1:
                    yield _joined(tensors, start, stop, padding * width)
                    continue
                yield from _zeros(padding * width)
                for tensor in tensors:
                    yield tensor.head_bytes(start)


def _blocks(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    """Yields the lines `start:stop`, of `size` bytes each, in ranges that are made together: many where they are short,
    else one by one."""
    together = min(_JOINED // size, stop - start)
    if together < _MANY:
        together = 1
    for at in range(start, stop, together):
        yield at, min(at + together, stop)


def _joined(tensors: Sequence["TensorBytes"], start: int, stop: int, padding: int) -> Bytes:
    """Lines `start:stop` of prefixes one behind the other, in memory of their own, each behind `padding` zeros."""
    zeros = torch.zeros(stop - start, padding, dtype=torch.uint8)
    return bytes_of(torch.cat([zeros, *(tensor.stacked_heads(start, stop) for tensor in tensors)], dim=1))


def mixed_mask(lengths: Tensor) -> Tensor:
    """From the virtual tokens of each row, `[B, 1]`: int64 `[B, N]`, N being the largest, 0 on the left."""
    tokens = int(lengths.max())
    return (torch.arange(tokens, device=lengths.device) >= tokens - lengths).to(torch.int64)


@dataclass(frozen=True, slots=True)
class TensorBytes:
    """A tensor `[L', 2, H', n, X]` in memory; `width` is bytes of X."""

    data: memoryview
    tokens: int
    width: int

    def head_bytes(self, line: int) -> Bytes:
        """The tokens of one head: the lines are those of `[L' * 2 * H']`."""
        size = self.tokens * self.width
        return self.data[line * size : (line + 1) * size]

    def stacked_heads(self, start: int, stop: int) -> Tensor:
        """The tokens of several heads, uint8 `[lines, n * width]`."""
        size = self.tokens * self.width
        return torch.frombuffer(self.data, dtype=torch.uint8)[start * size : stop * size].view(stop - start, size)

    def cell_bytes(self, cells: range, heads: int) -> Iterator[Bytes]:
        """The lines of cells in one piece."""
        size = heads * self.tokens * self.width
        yield self.data[cells.start * size : cells.stop * size]


class RepeatedBytes(TensorBytes):
    """A tensor `[L', 2, H', 1, X]` of which each token has the same."""

    def head_bytes(self, line: int) -> Bytes:
        """As `TensorBytes.line`."""
        return bytes(self.data[line * self.width : (line + 1) * self.width]) * self.tokens

    def stacked_heads(self, start: int, stop: int) -> Tensor:
        """As `TensorBytes.lines`."""
        once = torch.frombuffer(self.data, dtype=torch.uint8)[start * self.width : stop * self.width].view(
            stop - start, self.width
        )
        return once.repeat(1, self.tokens)

    def cell_bytes(self, cells: range, heads: int) -> Iterator[Bytes]:
        """As `TensorBytes.whole`, some lines at a time."""
        for start, stop in _blocks(cells.start * heads, cells.stop * heads, self.tokens * self.width):
            yield _joined([self], start, stop, 0) if stop - start > 1 else self.head_bytes(start)


def _zeros(size: int) -> Iterator[Bytes]:
    """So many bytes, of one memory for all."""
    while size > 0:
        yield _ZEROS[:size]
        size -= len(_ZEROS)
