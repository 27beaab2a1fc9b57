"""The norms of keys and values, and virtual tokens whose norms are those of attention sinks."""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from prefix_service.prefix.bins import ELEMENT_NBYTES, Bins, Rows, Shape

FEWEST_TOKENS: Final = 8
"""The fewest virtual tokens of which one can be sink-like: the spread of fewer says little."""

MOST_SINK_LIKE: Final = 32
"""The most sink-like tokens that are listed one by one."""

_OUTLIER: Final = 3.5 / 0.6745  # in median absolute deviations
_SMALL: Final = 0.5  # of the median
_ROUNDING: Final = 1e-6  # of the median: norms that differ by less are equal


@dataclass(frozen=True, slots=True)
class Norms:
    """Tables of norms, float64. A cell is the root mean square of the Euclidean norms of its vectors, each of which is
    the key (or value) of one token in one head.

    `by_head` is `[2, layers, kv_heads]`, `by_token` is `[2, layers, tokens]`, keys first; layers, heads and tokens are
    counted in bins. `sink_like` is int64 `[layers, tokens]`, the number of pairs of a layer and a sink-like token in
    each cell. `sink_like_tokens` are pairs of a token and the number of layers in which it is sink-like: at most
    `MOST_SINK_LIKE`, those of most layers first.
    """

    layers: Bins
    kv_heads: Bins
    tokens: Bins
    by_head: Tensor
    by_token: Tensor
    sink_like: Tensor
    sink_like_tokens: list[tuple[int, int]]


def measuring(shape: Shape, rows: Rows) -> Generator[None, None, Norms]:
    """Measures keys and values of finite numbers, one part per step; computed in float64."""
    layers, heads, tokens, _ = shape
    by_head = torch.zeros(2 * layers * heads, dtype=torch.float64)
    by_token = torch.zeros(2 * layers, tokens, dtype=torch.float64)
    for first, last in shape.parts():
        squares = rows(first, last).to(torch.float64, copy=True).square_().sum(-1)  # (n, N, D) -> (n, N)
        by_head[first:last] = squares.sum(1)
        by_token.index_add_(0, torch.arange(first, last) // heads, squares)
        yield
    norms = by_token.view(layers, 2, tokens).sqrt()
    marks = torch.zeros(layers, tokens, dtype=torch.bool)
    step = max(1, shape.part // tokens)
    for first in range(0, layers, step):
        marks[first : first + step] = sink_like(*norms[first : first + step].unbind(1))
        yield
    layer_bins = Bins.of_layers(layers)
    head_bins, token_bins = layer_bins.beside(heads), layer_bins.beside(tokens)
    return Norms(
        layer_bins,
        head_bins,
        token_bins,
        _table(by_head.view(layers, 2, heads), layer_bins, head_bins, tokens),
        _table(by_token.view(layers, 2, tokens), layer_bins, token_bins, heads),
        token_bins.summed(layer_bins.summed(marks.long(), 0), 1),
        _most_marked(marks),
    )


def sink_like(keys: Tensor, values: Tensor) -> Tensor:
    """Returns which tokens are sink-like in which layer, from the norms of keys and values over all heads, `[L, N]`.

    Attention sinks are tokens that draw attention whatever the query is, and add little to the result (Xiao et al.,
    *Efficient Streaming Language Models with Attention Sinks*, 2023). Their keys have another norm than those of all
    other tokens, and their values a small one (Gu et al., *When Attention Sink Emerges in Language Models*, 2024); they
    go with massive activations (Sun et al., *Massive Activations in Large Language Models*, 2024).

    So a token is sink-like in a layer if the norm of its key is an outlier, and the norm of its value is below half the
    layer's median. A norm is an outlier, large or small, if its modified z-score `0.6745 |x - median| / MAD` exceeds
    3.5 (Iglewicz and Hoaglin, *How to Detect and Handle Outliers*, 1993); MAD is the median absolute deviation.

    Norms alone are a hint: whether a token is a sink depends on the queries too.
    """
    if keys.shape[1] < FEWEST_TOKENS:
        return torch.zeros(keys.shape, dtype=torch.bool)
    median = keys.median(1, keepdim=True).values
    off = (keys - median).abs()
    spread = _OUTLIER * off.median(1, keepdim=True).values
    return (off > spread.clamp(min=_ROUNDING * median)) & (values < _SMALL * values.median(1, keepdim=True).values)


def measuring_nbytes(shape: Shape) -> int:
    """Returns the most bytes of memory that `measuring` takes."""
    sums = 2 * shape.layers * (shape.kv_heads + shape.tokens)
    return ELEMENT_NBYTES * shape.part + 4 * 8 * sums


def _table(squares: Tensor, rows: Bins, columns: Bins, vectors: int) -> Tensor:
    """Returns the norms `[2, rows, columns]` in bins, from sums of squares `[rows, 2, columns]`, each of so many
    vectors."""
    sums = columns.summed(rows.summed(squares, 0), 2)
    ones = torch.ones(rows.count, columns.count, dtype=torch.float64)
    counts = columns.summed(rows.summed(ones, 0), 1) * vectors
    return (sums / counts.unsqueeze(1)).sqrt().movedim(1, 0)


def _most_marked(marks: Tensor) -> list[tuple[int, int]]:
    counts = marks.sum(0)
    marked = counts.nonzero().flatten()
    order = counts[marked].argsort(descending=True, stable=True)[:MOST_SINK_LIKE]
    return [(int(token), int(counts[token])) for token in marked[order]]
