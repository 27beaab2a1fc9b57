"""Each rank of a sharded model fetches its own layers and heads, and no other byte."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from prefix_service.client import PrefixClient
from prefix_service.errors import InvalidRequest
from tests.client.conftest import Counting
from tests.client.counting_proxy import counting_proxy
from tests.conftest import Server

LAYERS, TOKENS, DIM = 4, 64, 32


def published(client: Any, adapter: str, heads: int) -> None:
    """Publishes an adapter of so many key/value heads, 16 KiB a layer and head."""
    config = {
        "peft_type": "PREFIX_TUNING",
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": TOKENS,
        "num_layers": LAYERS,
        "num_attention_heads": heads,
        "token_dim": heads * DIM,
        "num_transformer_submodules": 1,
        "prefix_projection": False,
    }
    values = torch.randn(TOKENS, LAYERS * 2 * heads * DIM, generator=torch.Generator().manual_seed(heads))
    client.publish_files(adapter, json.dumps(config).encode(), io.BytesIO(save({"prompt_embeddings": values})))


@pytest.fixture(autouse=True)
def adapters(server: Server) -> None:
    """Publishes the adapter for each test; publishing again makes no new version."""
    with PrefixClient(server.url, server.admin_key) as client:
        published(client, "ranks/eight", 8)


def test_two_ranks_fetch_half_each(connect: Callable[..., Any], server: Server) -> None:
    """Each of two ranks receives half the bytes, besides its head and the mask, and together they are the whole."""
    with counting_proxy(server.url) as proxy:
        client = connect(proxy.url)
        whole = client.get("ranks/eight").kv.tensor
        beside = proxy.taken() - whole.nbytes
        assert beside < 2048

        def part(divisor: int, **rank: tuple[int, int]) -> Tensor:
            kv = client.get("ranks/eight", **rank).kv
            assert abs(proxy.taken() - (whole.nbytes // divisor + beside)) <= 64
            tensor: Tensor = kv.tensor
            return tensor

        assert torch.equal(torch.cat([part(2, tp=(0, 2)), part(2, tp=(1, 2))], dim=2), whole)
        assert torch.equal(torch.cat([part(2, pp=(0, 2)), part(2, pp=(2, 4))]), whole)
        assert torch.equal(part(16, tp=(3, 4), pp=(1, 2)), whole[1:2, :, 6:8])


def test_more_ranks_than_heads(client: Any) -> None:
    """Each head is on equally many neighbouring ranks, which fetch the same, with one entity tag."""
    published(client, "ranks/two", 2)
    whole = client.get("ranks/two").kv.tensor
    for rank in range(8):
        part = client.get("ranks/two", tp=(rank, 8)).kv
        assert part.kv_heads == (rank // 4, rank // 4 + 1)
        assert torch.equal(part.tensor, whole[:, :, rank // 4 : rank // 4 + 1])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"tp": (0, 2), "kv_heads": (0, 4)}, r"tp=\(0, 2\) says which heads, and kv_heads=\(0, 4\) too"),
        ({"pp": (0, 2), "layers": (0, 2)}, r"pp=\(0, 2\) says which layers, and layers=\(0, 2\) too"),
        ({"tp": (2, 2)}, "a rank from 0 to size - 1, got rank 2 of 2"),
        ({"tp": (-1, 2)}, "got rank -1 of 2"),
        ({"tp": (0, 3)}, "cannot divide 8 key/value heads evenly among 3 ranks"),
        ({"tp": (0, 12)}, "8 key/value heads on 12 ranks: .* must be a multiple of 8"),
        ({"pp": (3, 5)}, "layers must be a range within 0:4, got 3:5"),
    ],
)
def test_ranks_that_cannot_be(client: Any, options: dict[str, Any], told: str) -> None:
    """The error has the numbers that contradict each other, are no rank, or do not divide."""
    with pytest.raises(InvalidRequest, match=told):
        client.get("ranks/eight", **options)


def test_a_rank_costs_one_request_and_follows_its_alias(server: Server) -> None:
    """A first fetch is one request, and the next a 304; if the alias moves to a version with other dimensions, the same
    rank gets its heads of that version.
    """
    through = Counting()
    with PrefixClient(server.url, server.admin_key, http=through) as client:
        published(client, "ranks/moving", 8)
        published(client, "ranks/moving", 2)
        through.statuses.clear()
        prod = "/v1/tenants/ranks/adapters/moving/aliases/prod"
        assert server.client().put(prod, json={"version": 1}).is_success
        assert [client.get("ranks/moving@prod", tp=(1, 2)).kv.kv_heads for _ in range(2)] == [(4, 8)] * 2
        assert server.client().put(prod, json={"version": 2}).is_success
        moved = client.get("ranks/moving@prod", tp=(1, 2))
        assert (moved.version, moved.kv.kv_heads) == (2, (1, 2))
        assert through.statuses == [200, 304, 200]
        assert [client.get("ranks/moving@2", tp=(rank, 2)).kv.kv_heads for rank in (0, 1)] == [(0, 1), (1, 2)]


def test_ranks_are_kept_apart_on_disk(server: Server, tmp_path: Path) -> None:
    """Ranks that share a cache on disk each get their own heads."""
    for _ in range(2):
        for rank in range(2):
            with PrefixClient(server.url, server.admin_key, cache_dir=tmp_path) as client:
                assert client.get("ranks/eight@1", tp=(rank, 2)).kv.kv_heads == (4 * rank, 4 * rank + 4)
    assert len(list(tmp_path.glob("*.prefix"))) == 2
