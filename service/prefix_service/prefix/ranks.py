"""Which key/value heads a rank of a tensor-parallel model holds: numbers alone, without torch."""

from prefix_service.errors import InvalidRequest
from prefix_service.prefix.variant import Span

Rank = tuple[int, int]
"""`(rank, size)`: one of `size` ranks, counted from 0."""


def check_rank(tp: Rank) -> Rank:
    """`tp`, if it is one of the ranks 0 … size-1.

    Raises:
        InvalidRequest: it is not.
    """
    rank, size = tp
    if not 0 <= rank < size:
        raise InvalidRequest(f"tp must be (rank, size) with a rank from 0 to size - 1, got rank {rank} of {size}")
    return rank, size


def kv_heads_of_rank(num_kv_heads: int, tp: Rank) -> Span:
    """The heads of `tp = (rank, size)`, a half-open range of the model's `num_kv_heads`.

    As vLLM (`QKVParallelLinear`) and Megatron-Core (`SelfAttention`) place them: consecutive heads, as many on each
    rank; with more ranks than heads, each head on `size / num_kv_heads` consecutive ranks.

    Raises:
        InvalidRequest: no such rank, or heads and ranks do not divide.
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
