"""The heads of a tensor-parallel rank are compared with a tensor of all heads, split as a model splits its weights."""

import re

import pytest
import torch

from prefix_service.errors import InvalidRequest
from prefix_service.prefix.ranks import kv_heads_of_rank


@pytest.mark.parametrize("heads", [1, 2, 3, 8])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 8, 16])
def test_heads_are_placed_as_the_weights_are(heads: int, size: int) -> None:
    """Each rank gets an equal run of heads; with more ranks than heads, neighbouring ranks share a head; sizes that do
    not divide are refused, never rounded.
    """
    if heads % size and size % heads:
        with pytest.raises(InvalidRequest, match=rf"{heads} key/value heads .*{size} ranks"):
            kv_heads_of_rank(heads, (0, size))
        return
    placed = torch.arange(heads).repeat_interleave(max(1, size // heads)).chunk(size)
    for rank in range(size):
        first, last = kv_heads_of_rank(heads, (rank, size))
        assert list(range(first, last)) == placed[rank].tolist()


@pytest.mark.parametrize("tp", [(2, 2), (-1, 2), (0, 0), (0, -1)])
def test_a_rank_that_does_not_exist(tp: tuple[int, int]) -> None:
    """Ranks count from 0 to size - 1."""
    with pytest.raises(InvalidRequest, match=re.escape(f"got rank {tp[0]} of {tp[1]}")):
        kv_heads_of_rank(4, tp)
