"""Maps the ranks of a tensor-parallel model to the key/value heads that they hold: numbers alone, without torch."""

from prefix_service.errors import InvalidRequest
from prefix_service.prefix.variant import Span

Rank = tuple[int, int]
"""`(rank, size)`: one of `size` ranks, counted from 0."""


def check_rank(tp: Rank) -> Rank:
    """Returns `tp` if its rank is one of 0 … size-1.

    Raises:
        InvalidRequest: there is no such rank.
    """
    rank, size = tp
    if not 0 <= rank < size:
        raise InvalidRequest(f"tp must be (rank, size) with a rank from 0 to size - 1, got rank {rank} of {size}")
    return rank, size


def kv_heads_of_rank(num_kv_heads: int, tp: Rank) -> Span:
    """Returns the heads of `tp = (rank, size)` as a half-open range of the model's `num_kv_heads`.

    Heads are placed as by vLLM (`QKVParallelLinear`) and Megatron-Core (`SelfAttention`): consecutive heads, equally
    many on each rank; with more ranks than heads, each head on `size / num_kv_heads` consecutive ranks.

    Raises:
        InvalidRequest: there is no such rank, or the heads cannot be divided evenly.
    """
    rank, size = check_rank(tp)
    if size <= num_kv_heads:
        if num_kv_heads % size:
            raise InvalidRequest(f"tp cannot divide {num_kv_heads} key/value heads evenly among {size} ranks")
        each = num_kv_heads // size
        return rank * each, (rank + 1) * each
    if size % num_kv_heads:
        raise InvalidRequest(
            f"tp cannot place {num_kv_heads} key/value heads on {size} ranks: "
            f"with more ranks than heads, their number must be a multiple of {num_kv_heads}"
        )
    head = rank // (size // num_kv_heads)
    return head, head + 1
