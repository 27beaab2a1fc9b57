"""How far the keys and values of two prefixes of one shape are apart."""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from prefix_service.errors import InvalidRequest
from prefix_service.prefix.bins import ELEMENT_NBYTES, Bins, Rows, Shape


@dataclass(frozen=True, slots=True)
class Difference:
    """The difference of two tensors of one shape.

    `max_absolute` is the largest absolute difference of two elements. `relative` is the Euclidean norm of the
    difference, divided by the larger of both norms: 0 for equal tensors, at most 2. `cosine` is the cosine of the angle
    between the tensors as vectors, -1 … 1: 1 for equal ones, 0 if one of two different tensors is zero.
    """

    max_absolute: float
    relative: float
    cosine: float

    @classmethod
    def between(cls, first: Tensor, second: Tensor) -> Self:
        """Returns the difference of two tensors of finite numbers; computed in float64."""
        one, other = first.double().reshape(1, -1), second.double().reshape(1, -1)
        return cls.of(_sums(one, other, torch.empty_like(one))[0])

    @classmethod
    def of(cls, sums: Tensor) -> Self:
        """Returns the difference in the sums `[5]` of `comparing`, or in those of several heads together."""
        return cls(float(sums[4]), float(relative(sums)), float(cosine(sums)))


@dataclass(frozen=True, slots=True)
class LayerDifference:
    """The differences of the keys and of the values of one layer; `layer` is its number in the model, from 0."""

    layer: int
    keys: Difference
    values: Difference


def require_same_shape(first: Shape, second: Shape) -> None:
    """Raises InvalidRequest if two prefixes differ in the number of layers, heads or tokens, or in the head size."""
    if first != second:
        raise InvalidRequest(
            f"keys and values of different shapes are not compared: {first} and {second}; choose versions of one shape"
        )


def comparing(shape: Shape, first: Rows, second: Rows) -> Generator[None, None, Tensor]:
    """Compares keys and values of finite numbers, one part per step; computed in float64.

    Returns `[L, 2, H, 5]`, for each head: the sums of the squares of both, of their products, and of the squares of
    their differences, and the largest absolute difference.
    """
    found = []
    memory = torch.empty(3, shape.part, dtype=torch.float64)  # once: fresh memory costs more than the arithmetic
    for start, stop in shape.parts():
        one, other, work = memory[:, : (stop - start) * shape.tokens * shape.head_dim].view(3, stop - start, -1)
        one.copy_(first(start, stop).flatten(1))
        other.copy_(second(start, stop).flatten(1))
        found.append(_sums(one, other, work))
        yield
    return torch.cat(found).view(shape.layers, 2, shape.kv_heads, 5)


def comparing_nbytes(shape: Shape) -> int:
    """Returns the most bytes of memory that `comparing` takes."""
    return ELEMENT_NBYTES * shape.part + 3 * 5 * 8 * 2 * shape.layers * shape.kv_heads


def together(sums: Tensor, bins: Bins, dim: int) -> Tensor:
    """Returns the sums `[…, 5]` of `comparing` for the bins along a dimension."""
    return torch.cat([bins.summed(sums[..., :4], dim), bins.largest(sums[..., 4:], dim)], dim=-1)


def layer_differences(sums: Tensor, layers: Bins, first_layer: int = 0) -> list[LayerDifference]:
    """Returns the differences of each bin of layers, in their order, from the sums `[L, 2, H, 5]`."""
    heads = Bins(sums.shape[2], sums.shape[2])
    merged = together(together(sums, layers, 0), heads, 2)[:, :, 0]
    return [
        LayerDifference(first_layer + at * layers.step, Difference.of(keys), Difference.of(values))
        for at, (keys, values) in enumerate(merged)
    ]


def relative(sums: Tensor) -> Tensor:
    """Returns the relative distances `[…]` in sums `[…, 5]`; see `Difference`."""
    first, second, _, off, _ = sums.unbind(-1)
    return torch.where(off > 0, (off / torch.maximum(first, second)).sqrt(), 0)


def cosine(sums: Tensor) -> Tensor:
    """Returns the cosine similarities `[…]` in sums `[…, 5]`; see `Difference`."""
    first, second, product, off, _ = sums.unbind(-1)
    norms = first.sqrt() * second.sqrt()
    found = torch.where(norms > 0, product / norms, 0).clamp(-1, 1)
    return torch.where(off > 0, found, 1)  # rounding would make the cosine of equal tensors slightly less than 1


def _sums(first: Tensor, second: Tensor, work: Tensor) -> Tensor:
    """Returns the sums `[n, 5]` of two float64 tensors `[n, …]`; overwrites `work`, a third of their shape."""
    products = [torch.mul(a, b, out=work).sum(1) for a, b in ((first, first), (second, second), (first, second))]
    off = torch.sub(second, first, out=work)
    largest = torch.maximum(off.amax(1), -off.amin(1))
    return torch.stack([*products, off.square_().sum(1), largest], 1)
