"""Masks and position ids of an answer. Rows are made when they are sent: memory does not grow with the batch."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Final

import torch
from torch import Tensor

from prefix_service.prefix.buffers import bytes_of
from prefix_service.prefix.kv import position_ids

Bytes = bytes | memoryview
Piece = tuple[Bytes, int]
"""Bytes, and how many times in a row they are sent."""

_BLOCK: Final = 1 << 20  # bytes of rows that are made in one step


@dataclass(frozen=True, slots=True)
class InputMask:
    """An input's attention mask: `flags`, uint8 `[B, S]` of zeros and ones, and the dtype in which it was sent."""

    flags: Tensor
    dtype: torch.dtype

    @classmethod
    def empty(cls, batch_size: int) -> "InputMask":
        """Returns a mask of no tokens, `[B, 0]`."""
        return cls(torch.zeros(batch_size, 0, dtype=torch.uint8), torch.int64)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and tokens, `(B, S)`."""
        batch_size, tokens = self.flags.shape
        return batch_size, tokens


class Extra(ABC):
    """A tensor `[B, width]` of an answer that is neither keys nor values."""

    dtype: torch.dtype

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """Rows and width, `(B, width)`."""

    @abstractmethod
    def rows(self, start: int, stop: int) -> Tensor:
        """Returns the rows `start:stop`."""

    @property
    def nbytes(self) -> int:
        """The size of the tensor in bytes."""
        return prod(self.shape) * self.dtype.itemsize

    def pieces(self) -> Iterator[Piece]:
        """Yields the tensor's bytes in order, a megabyte or one row at a time."""
        if not self.nbytes:
            return
        batch_size, width = self.shape
        together = max(_BLOCK // (width * self.dtype.itemsize), 1)
        for start in range(0, batch_size, together):
            yield bytes_of(self.rows(start, min(start + together, batch_size)).contiguous()), 1


@dataclass(frozen=True)
class AttentionMask(Extra):
    """The attention mask of prefix and input, `[B, N + S]`.

    A row has zeros in front of its virtual tokens, ones for them, and then the input's mask. `lengths`, int64 `[B, 1]`,
    are the virtual tokens of each row; by default every row has all `N`.
    """

    batch_size: int
    tokens: int
    dtype: torch.dtype
    input: InputMask | None = None
    lengths: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and tokens, `(B, N + S)`."""
        return self.batch_size, self.tokens + (0 if self.input is None else self.input.shape[1])

    def rows(self, start: int, stop: int) -> Tensor:
        """Returns the rows `start:stop`."""
        mask = torch.ones(stop - start, self.tokens, dtype=self.dtype)
        if self.lengths is not None:
            mask = (torch.arange(self.tokens) >= self.tokens - self.lengths[start:stop]).to(self.dtype)
        if self.input is not None:
            mask = torch.cat([mask, self.input.flags[start:stop].to(self.dtype)], dim=1)
        return mask

    def pieces(self) -> Iterator[Piece]:
        """Yields the mask's bytes in order; equal rows are one piece."""
        if self.input is None and self.lengths is None:
            yield bytes_of(self.rows(0, 1)), self.batch_size
        else:
            yield from super().pieces()


@dataclass(frozen=True)
class PositionIds(Extra):
    """Positions of the input's tokens, int64 `[B, S]`. Each row's positions start at its number of virtual tokens: `N`,
    or its entry in `lengths`.
    """

    tokens: int
    input: InputMask
    lengths: Tensor | None = None
    dtype: torch.dtype = torch.int64

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and tokens, `(B, S)`."""
        return self.input.shape

    def rows(self, start: int, stop: int) -> Tensor:
        """Returns the rows `start:stop`."""
        behind = self.tokens if self.lengths is None else self.lengths[start:stop]
        return position_ids(self.input.flags[start:stop], behind)
