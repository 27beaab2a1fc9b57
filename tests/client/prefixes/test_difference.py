"""The difference of two prefixes has figures that can be computed by hand, within their bounds."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from prefix_service.client.prefixes.difference import differences
from prefix_service.client.prefixes.prefix import Prefix
from prefix_service.errors import InvalidRequest
from prefix_service.prefix.comparison import Difference
from prefix_service.prefix.kv import PrefixKV


def prefix(tensor: Tensor) -> Prefix:
    """Returns a prefix of `[L, 2, H, N, D]`."""
    return Prefix(PrefixKV.whole(tensor), {})


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([3.0, 4.0], [3.0, 4.0], (0, 0, 1)),
        ([0.0, 0.0], [0.0, 0.0], (0, 0, 1)),
        ([3.0, 4.0], [6.0, 8.0], (4, 0.5, 1)),
        ([6.0, 8.0], [3.0, 4.0], (4, 0.5, 1)),
        ([3.0, 4.0], [-3.0, -4.0], (8, 2, -1)),
        ([1.0, 0.0], [0.0, 1.0], (1, math.sqrt(2), 0)),
        ([0.0, 0.0], [0.0, 5.0], (5, 1, 0)),
    ],
)
def test_figures(first: list[float], second: list[float], expected: tuple[float, float, float]) -> None:
    """A difference has the largest difference, the distance over the larger norm, and the cosine."""
    found = Difference.between(torch.tensor(first), torch.tensor(second))
    assert (found.max_absolute, found.relative, found.cosine) == pytest.approx(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equal_tensors_are_exactly_equal(dtype: torch.dtype) -> None:
    """Equal tensors differ by exactly nothing, and the bounds hold for nearly equal and nearly opposite ones."""
    tensor = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert Difference.between(tensor, tensor.clone()) == Difference(0.0, 0.0, 1.0)
    near = tensor.clone()
    near[0] += 1
    assert 0.99 < Difference.between(tensor, near).cosine <= 1
    assert -1 <= Difference.between(tensor, -near).cosine < -0.99


def test_the_largest_numbers_do_not_overflow() -> None:
    """float32's largest numbers, whose squares float32 cannot hold, are compared."""
    largest = torch.full((4,), torch.finfo(torch.float32).max)
    found = Difference.between(largest, -largest)
    assert (found.relative, found.cosine) == pytest.approx((2, -1))


def test_layers_are_compared_with_their_like() -> None:
    """Keys are compared with keys and values with values, layer by layer, whatever their dtypes."""
    first = torch.randn(3, 2, 2, 5, 4, generator=torch.Generator().manual_seed(1)).bfloat16()
    second = first.float()
    second[2, 0] *= 3
    found = differences(prefix(first), prefix(second))
    assert [it.layer for it in found] == [0, 1, 2]
    same = Difference(0.0, 0.0, 1.0)
    assert [(it.keys == same, it.values == same) for it in found] == [(True, True), (True, True), (False, True)]
    assert found[2].keys.relative == pytest.approx(2 / 3)


@pytest.mark.parametrize("shape", [(2, 2, 2, 5, 4), (3, 2, 1, 5, 4), (3, 2, 2, 6, 4), (3, 2, 2, 5, 8)])
def test_other_shapes_are_not_compared(shape: Any) -> None:
    """The error names both shapes."""
    with pytest.raises(InvalidRequest, match="3 layers of 2 heads, 5 tokens and head size 4 and "):
        differences(prefix(torch.zeros(3, 2, 2, 5, 4)), prefix(torch.zeros(shape)))
