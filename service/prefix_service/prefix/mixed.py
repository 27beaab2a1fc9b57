"""One batch for many adapters: the rows of one forward pass of a base model, each with a prefix of its own.

Prefixes of several lengths are right-aligned in `[…, N, D]`, where N is the longest: shorter rows have zeros in front,
and the mask is 0 there. A row may have several prefixes, concatenated, or none. This module computes which bytes are
where and copies none, so that the service can send them and a client can write them into its own memory.
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
from prefix_service.prefix.variant import DtypePair, Identity, KVDtype

MOST_IN_A_ROW: Final = 32
"""The most prefixes that one row may have."""

_JOINED: Final = 1 << 18  # bytes of short heads that are joined in one step
_MANY: Final = 16  # heads, from which joining is faster than sending one by one
_ZEROS: Final = memoryview(bytes(1 << 20))

Bytes = bytes | memoryview


@dataclass(frozen=True, slots=True)
class RowPrefix:
    """One prefix of a row: the reference that was asked for, its identity, and its stored dtype."""

    ref: str
    identity: Identity
    dtype: KVDtype
    is_encoder_decoder: bool = False

    @property
    def shape(self) -> tuple[int, int, int, bool]:
        """The properties that the prefixes of one base model share: layers, key/value heads, head size, and whether the
        model is an encoder-decoder.
        """
        identity = self.identity
        return identity.num_layers, identity.num_kv_heads, identity.head_dim, self.is_encoder_decoder

    def as_metadata(self) -> dict[str, Any]:
        """Returns the prefix as metadata: `ref`, `version`, `digest` and `num_virtual_tokens`."""
        about = {name: getattr(self.identity, name) for name in ("version", "digest", "num_virtual_tokens")}
        return {"ref": self.ref, **about}

    def __str__(self) -> str:
        layers, heads, head_dim, is_encoder_decoder = self.shape
        kind = ", for an encoder-decoder model" if is_encoder_decoder else ""
        return f"{self.ref} has {layers} layers and {heads} key/value heads of size {head_dim}{kind}"


@dataclass(frozen=True, slots=True)
class Row:
    """The prefixes of one row in order; empty if it has none. `is_list` is whether the caller sent a list."""

    prefixes: tuple[RowPrefix, ...] = ()
    is_list: bool = False

    @property
    def num_virtual_tokens(self) -> int:
        """The virtual tokens of its prefixes together."""
        return sum(prefix.identity.num_virtual_tokens for prefix in self.prefixes)

    def as_metadata(self) -> Any:
        """Returns the row as metadata: a prefix with `ref`, `version`, `digest` and `num_virtual_tokens`, a list of
        them, or None.
        """
        documents = [prefix.as_metadata() for prefix in self.prefixes]
        return documents if self.is_list else documents[0] if documents else None


@dataclass(frozen=True)
class MixedBatch:
    """Rows whose prefixes fit one base model, with keys in one dtype and values in one."""

    rows: tuple[Row, ...]
    dtypes: DtypePair

    @classmethod
    def of(
        cls, rows: Sequence[Row], key_dtype: KVDtype | None = None, value_dtype: KVDtype | None = None
    ) -> "MixedBatch":
        """Checks rows against each other, and returns their batch; the default of both dtypes is the stored one.

        Raises:
            InvalidRequest: no row has a prefix; a prefix differs from the first in layers, heads or head size; or
                stored dtypes differ and the caller did not ask for both dtypes.
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
            if None in (key_dtype, value_dtype) and prefix.dtype != first.dtype:
                raise InvalidRequest(
                    f"row {index}: {prefix.ref} is stored as {prefix.dtype}, but row {first_index}: {first.ref} as "
                    f"{first.dtype}; say in dtype which one is wanted"
                )
        return cls(tuple(rows), DtypePair(key_dtype or first.dtype, value_dtype or first.dtype))

    @cached_property
    def first(self) -> RowPrefix:
        """The first prefix; the others have the same dimensions."""
        return next(chain.from_iterable(row.prefixes for row in self.rows))

    @cached_property
    def num_virtual_tokens(self) -> int:
        """N, the virtual tokens of the longest row."""
        return max(row.num_virtual_tokens for row in self.rows)

    @cached_property
    def lengths(self) -> Tensor:
        """The virtual tokens of each row, int64 `[B, 1]`."""
        return torch.tensor([[row.num_virtual_tokens] for row in self.rows])

    def byte_runs(self, sources: Sequence[Sequence["TensorBytes"]], heads: int, cells: range) -> Iterator[Bytes]:
        """Yields the bytes of `cells` in order: row by row, head by head.

        A cell is one layer's keys or one layer's values. `sources` has one tensor per prefix, nested as in `rows`; it
        has the cells `2i` and `2i + 1` of layer `i`, or if it holds keys or values alone, cell `i`. The runs are bytes
        of these tensors, and zeros.
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
    """Yields the heads `start:stop` in ranges that are joined in one step: many heads per range if they are short, else
    one. A head has `size` bytes.
    """
    together = min(_JOINED // size, stop - start)
    if together < _MANY:
        together = 1
    for at in range(start, stop, together):
        yield at, min(at + together, stop)


def _joined(tensors: Sequence["TensorBytes"], start: int, stop: int, padding: int) -> Bytes:
    """Returns the heads `start:stop` of concatenated prefixes in new memory, each behind `padding` zeros."""
    zeros = torch.zeros(stop - start, padding, dtype=torch.uint8)
    return bytes_of(torch.cat([zeros, *(tensor.stacked_heads(start, stop) for tensor in tensors)], dim=1))


def mixed_mask(lengths: Tensor) -> Tensor:
    """Returns the attention mask, int64 `[B, N]`, of rows with `lengths` `[B, 1]` virtual tokens. N is the largest
    length; shorter rows have zeros on the left.
    """
    tokens = int(lengths.max())
    return (torch.arange(tokens, device=lengths.device) >= tokens - lengths).to(torch.int64)


@dataclass(frozen=True, slots=True)
class TensorBytes:
    """The memory of a tensor `[L', P, H', n, X]`: `tokens` is n, `width` is the bytes of X, P is 2 for keys and values.

    Heads are numbered in the order of memory, 0 … L' * P * H' - 1.
    """

    data: memoryview
    tokens: int
    width: int

    def head_bytes(self, head: int) -> Bytes:
        """Returns the bytes of one head's tokens."""
        size = self.tokens * self.width
        return self.data[head * size : (head + 1) * size]

    def stacked_heads(self, start: int, stop: int) -> Tensor:
        """Returns the tokens of the heads `start:stop`, uint8 `[stop - start, n * width]`."""
        size = self.tokens * self.width
        return torch.frombuffer(self.data, dtype=torch.uint8)[start * size : stop * size].view(stop - start, size)

    def cell_bytes(self, cells: range, heads: int) -> Iterator[Bytes]:
        """Yields the bytes of whole cells, each of `heads` heads, in one piece."""
        size = heads * self.tokens * self.width
        yield self.data[cells.start * size : cells.stop * size]


class RepeatedBytes(TensorBytes):
    """The memory of a tensor `[L', P, H', 1, X]` whose only token stands for all `tokens` tokens."""

    def head_bytes(self, head: int) -> Bytes:
        """Returns the bytes of one head's tokens."""
        return bytes(self.data[head * self.width : (head + 1) * self.width]) * self.tokens

    def stacked_heads(self, start: int, stop: int) -> Tensor:
        """Returns the tokens of the heads `start:stop`, uint8 `[stop - start, n * width]`."""
        once = torch.frombuffer(self.data, dtype=torch.uint8)[start * self.width : stop * self.width].view(
            stop - start, self.width
        )
        return once.repeat(1, self.tokens)

    def cell_bytes(self, cells: range, heads: int) -> Iterator[Bytes]:
        """Yields the bytes of whole cells, some heads at a time."""
        for start, stop in _blocks(cells.start * heads, cells.stop * heads, self.tokens * self.width):
            yield _joined([self], start, stop, 0) if stop - start > 1 else self.head_bytes(start)


def _zeros(size: int) -> Iterator[Bytes]:
    """Yields `size` zeros, as views of one shared block."""
    while size > 0:
        yield _ZEROS[:size]
        size -= len(_ZEROS)
