"""Compares two prefixes layer by layer. Needs torch."""

from dataclasses import dataclass
from typing import Self

from torch import Tensor

from prefix_service.client.prefixes.prefix import Prefix
from prefix_service.errors import InvalidRequest


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
        first, second = first.double().flatten(), second.double().flatten()
        off = second - first
        if not off.any():  # exactly equal; rounding would make the cosine slightly less than 1
            return cls(0.0, 0.0, 1.0)
        norms = float(first.norm()), float(second.norm())
        cosine = float(first @ second) / (norms[0] * norms[1]) if all(norms) else 0.0
        return cls(float(off.abs().max()), float(off.norm()) / max(norms), max(-1.0, min(cosine, 1.0)))


@dataclass(frozen=True, slots=True)
class LayerDifference:
    """The differences of the keys and of the values of one layer; `layer` is its number in the model, from 0."""

    layer: int
    keys: Difference
    values: Difference


def differences(first: Prefix, second: Prefix) -> list[LayerDifference]:
    """Returns the differences of two prefixes, in the order of their layers.

    Raises:
        InvalidRequest: they differ in the number of layers, heads or tokens, or in the head size.
    """
    one, other = first.kv.tensor, second.kv.tensor
    if one.shape != other.shape:
        sizes = " and ".join(
            f"{layers} layers of {heads} heads, {tokens} tokens and head size {size}"
            for layers, _, heads, tokens, size in (one.shape, other.shape)
        )
        raise InvalidRequest(f"keys and values of different shapes are not compared: {sizes}")
    start, _ = first.kv.layers
    return [
        LayerDifference(start + layer, *(Difference.between(a[part], b[part]) for part in (0, 1)))
        for layer, (a, b) in enumerate(zip(one, other, strict=True))
    ]
