"""Bins along an axis of keys and values, and reading them in parts: figures of a prefix of any size stay small."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple, Self

import torch.nn.functional as F  # noqa: N812 - its customary name
from torch import Tensor

MOST_LAYERS: Final = 128
"""The most bins of layers; models with more layers are rare."""

MOST_CELLS: Final = 4096
"""The most cells of a table of layers by heads, or of layers by virtual tokens."""

ELEMENT_NBYTES: Final = 64
"""The bytes of memory that figures take at most per element of a part: both inputs, and four tensors of float64."""

_PART: Final = 1 << 20  # elements

Rows = Callable[[int, int], Tensor]
"""Returns the rows `first:last` of keys and values `[L * 2 * H, N, D]`: layer, key or value, head."""


class Shape(NamedTuple):
    """The dimensions of keys and values `[L, 2, H, N, D]`, of which the second is always 2."""

    layers: int
    kv_heads: int
    tokens: int
    head_dim: int

    @classmethod
    def of(cls, tensor: Tensor) -> Self:
        """Returns the dimensions of a tensor `[L, 2, H, N, D]`."""
        layers, _, heads, tokens, size = tensor.shape
        return cls(layers, heads, tokens, size)

    def __str__(self) -> str:
        return f"{self.layers} layers of {self.kv_heads} heads, {self.tokens} tokens and head size {self.head_dim}"

    @property
    def part(self) -> int:
        """The number of elements that are read at a time: about a million, and at least one row."""
        row = self.tokens * self.head_dim
        return max(1, _PART // row) * row

    def parts(self) -> Iterator[tuple[int, int]]:
        """Yields half-open ranges of rows, each of at most `part` elements."""
        rows, step = 2 * self.layers * self.kv_heads, self.part // (self.tokens * self.head_dim)
        for first in range(0, rows, step):
            yield first, min(first + step, rows)


def rows_of(tensor: Tensor) -> Rows:
    """Returns a reader of the rows of a tensor `[L, 2, H, N, D]` in memory."""
    flat = tensor.flatten(0, 2)
    return lambda first, last: flat[first:last]


@dataclass(frozen=True, slots=True)
class Bins:
    """An axis of `count` positions in bins of `step` neighbours each; the last bin may have fewer."""

    count: int
    step: int

    @classmethod
    def of_layers(cls, count: int) -> Self:
        """Returns bins for the layers of a table."""
        return cls(count, -(-count // MOST_LAYERS))

    def beside(self, count: int) -> "Bins":
        """Returns bins for the other axis of a table, so that the table has at most `MOST_CELLS` cells."""
        return Bins(count, -(-count // (MOST_CELLS // self.number)))

    @property
    def number(self) -> int:
        """The number of bins."""
        return -(-self.count // self.step)

    def summed(self, tensor: Tensor, dim: int) -> Tensor:
        """Returns the sums over the positions of each bin, along dimension `dim` of `count` positions."""
        return self._binned(tensor, dim).sum(-1).movedim(-1, dim)

    def largest(self, tensor: Tensor, dim: int) -> Tensor:
        """Returns the largest value of each bin, of values that are not negative."""
        return self._binned(tensor, dim).amax(-1).movedim(-1, dim)

    def _binned(self, tensor: Tensor, dim: int) -> Tensor:
        # (…, count, …) -> (…, number, step), the last bin filled with zeros
        moved = tensor.movedim(dim, -1)
        padded = F.pad(moved, (0, self.number * self.step - self.count))
        return padded.reshape(*moved.shape[:-1], self.number, self.step)
