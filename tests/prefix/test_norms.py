"""Norms are those that plain torch computes, in bins where axes are long; sink-like tokens stand out."""

import statistics

import pytest
import torch
from torch import Tensor

from prefix_service.prefix import bins
from prefix_service.prefix.bins import MOST_CELLS, MOST_LAYERS, Bins, Shape, rows_of
from prefix_service.prefix.encoder import finished
from prefix_service.prefix.norms import FEWEST_TOKENS, MOST_SINK_LIKE, Norms, measuring, sink_like


def drawn(*shape: int) -> Tensor:
    """Returns keys and values `[L, 2, H, N, D]`."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def measured(tensor: Tensor) -> Norms:
    """Returns the norms of keys and values."""
    return finished(measuring(Shape.of(tensor), rows_of(tensor)))


def test_tables_are_root_mean_squares_of_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cell is the root mean square of its vectors' norms, however many parts the prefix is read in."""
    monkeypatch.setattr(bins, "_PART", 2 * 5 * 4)
    tensor = drawn(3, 2, 3, 5, 4).bfloat16()
    found = measured(tensor)
    norms = tensor.double().norm(dim=-1)  # (L, 2, H, N)
    torch.testing.assert_close(found.by_head, norms.square().mean(3).sqrt().movedim(1, 0))
    torch.testing.assert_close(found.by_token, norms.square().mean(2).sqrt().movedim(1, 0))


def test_long_axes_are_binned() -> None:
    """More layers, heads or tokens than a table has room for share bins, of which the last may be smaller."""
    tensor = drawn(MOST_LAYERS + 1, 2, 3, 1001, 1)
    found = measured(tensor)
    assert (found.layers, found.kv_heads, found.tokens) == (Bins(129, 2), Bins(3, 1), Bins(1001, 16))
    assert found.by_token.shape == (2, 65, 63)
    assert found.by_token[0].numel() <= MOST_CELLS
    squares = tensor.double().square()
    for layers, cell in ((slice(4, 6), 2), (slice(128, 129), 64)):
        for tokens, column in ((slice(16, 32), 1), (slice(992, 1001), 62)):
            expected = squares[layers, 0, :, tokens].mean().sqrt()
            torch.testing.assert_close(found.by_token[0, cell, column], expected)
    torch.testing.assert_close(found.by_head[1, 64, 2], squares[128, 1, 2].mean().sqrt())


def test_the_largest_numbers_do_not_overflow() -> None:
    """float32's largest numbers, whose squares float32 cannot hold, have norms."""
    largest = torch.finfo(torch.float32).max
    assert measured(torch.full((1, 2, 1, 1, 4), largest)).by_head[0, 0, 0] == pytest.approx(2 * largest)


@pytest.mark.parametrize("factor", [0.2, 5])
def test_a_sink_stands_out(factor: float) -> None:
    """A token with an unusual key, short or long, and a short value is sink-like; one of both alone is not."""
    tensor = drawn(2, 2, 4, 40, 16)
    tensor[0, 0, :, 7] *= factor
    tensor[0, 1, :, 7] *= 0.1
    tensor[1, 0, :, 8] *= factor
    tensor[1, 1, :, 8] *= 3
    tensor[1, 1, :, 9] *= 0.1
    tensor[:, 0, :, 10] *= factor
    tensor[:, 1, :, 10] *= 0.1
    found = measured(tensor)
    assert found.sink_like.nonzero().tolist() == [[0, 7], [0, 10], [1, 10]]
    assert found.sink_like_tokens == [(10, 2), (7, 1)]


def test_the_rule_of_outliers() -> None:
    """A norm is an outlier if its modified z-score exceeds 3.5, as Iglewicz and Hoaglin define it."""
    keys = drawn(1, 101).exp().double()
    row = keys[0].tolist()
    median = statistics.median(row)
    deviation = statistics.median(abs(norm - median) for norm in row)
    expected = [0.6745 * abs(norm - median) / deviation > 3.5 for norm in row]
    assert any(expected)
    short = [is_outlier or token % 3 == 0 for token, is_outlier in enumerate(expected)]
    values = torch.where(torch.tensor([short]), 0.9, 2.0)
    assert sink_like(keys, values).tolist() == [expected]
    assert not sink_like(keys, torch.where(torch.tensor([expected]), 1.1, 2.0)).any()


def test_equal_norms_are_no_outliers() -> None:
    """Norms that differ by rounding alone are equal, and few tokens have no outliers."""
    values = torch.ones(1, 40)
    values[0, 3] = 0.1
    keys = torch.ones(1, 40, dtype=torch.float64)
    keys[0, 3] += 1e-9
    assert not sink_like(keys, values).any()
    keys[0, 3] = 2
    assert sink_like(keys, values).nonzero().tolist() == [[0, 3]]
    fewer = FEWEST_TOKENS - 1
    assert not sink_like(keys[:, :fewer], values[:, :fewer]).any()


def test_few_sinks_are_listed() -> None:
    """The list of sink-like tokens is bounded; the table counts all of them."""
    tensor = torch.ones(1, 2, 1, 200, 1)
    tensor[0, 0, 0, :80] = 9
    tensor[0, 1, 0, :80] = 0.1
    found = measured(tensor)
    assert int(found.sink_like.sum()) == 80
    assert found.sink_like_tokens == [(token, 1) for token in range(MOST_SINK_LIKE)]
