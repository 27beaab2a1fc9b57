"""Overload by one tenant, by the machine's memory, by one broken adapter: it is refused, and others are served."""

import resource
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import save

from prefix_service.blobs.folder import FolderBlobStore
from prefix_service.registry.registry import LEAST
from prefix_service.system.failures import REMEMBERED_SECONDS
from tests.api.helpers import CONFIG, assert_alive, problem, upload, weights
from tests.conftest import Server, running_server


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Server]:
    """Yields a server with room for twelve small prefixes, and as many renderings."""
    budgets = dict.fromkeys(("PREFIX_DEVICE_BYTES", "PREFIX_RENDERING_BYTES"), str(12 * LEAST))
    with running_server(tmp_path / "data", environment=budgets) as running:
        yield running


def is_resident(client: httpx.Client, tenant: str, adapter: str) -> bool:
    found: bool = client.get(f"/v1/tenants/{tenant}/adapters/{adapter}/residency").json()["resident"]
    return found


@pytest.mark.one_process("what is in memory is each replica's own")
def test_hardening_57_a_tenant_that_thrashes(small: Server) -> None:
    """A tenant that reads fifty adapters in turn, many in parallel, evicts nothing that is guaranteed to another
    tenant, read or pinned."""
    admin = small.client()
    for number in range(3):
        upload(admin, "calm", f"a{number}", file=weights(number))
    for number in range(50):
        upload(admin, "wild", f"a{number}", file=weights(100 + number))
    assert admin.put("/v1/tenants/calm/adapters/a0/residency", json={"pinned": True}).status_code == 200
    for number in range(1, 3):
        assert admin.get(f"/v1/tenants/calm/adapters/a{number}/prefix").status_code == 200

    def thrash(worker: int) -> set[int]:
        client = small.client()
        return {
            client.get(f"/v1/tenants/wild/adapters/a{(worker + step) % 50}/prefix").status_code for step in range(50)
        }

    with ThreadPoolExecutor(4) as pool:
        assert set[int]().union(*pool.map(thrash, range(0, 50, 13))) == {200}
    assert [is_resident(admin, "calm", f"a{number}") for number in range(3)] == [True] * 3
    overview = admin.get("/v1/residency").json()
    assert overview["tiers"][0]["evictions"] > 50
    reasons = {row["adapter"]: row["reason"] for row in overview["resident"] if row["tenant"] == "calm"}
    assert reasons == {"a0": "pinned", "a1": "share", "a2": "share"}


# 16 layers, 8 heads of 64, 1024 tokens, float32: 64 MiB.
LARGE: dict[str, Any] = {
    **CONFIG,
    "num_virtual_tokens": 1024,
    "num_layers": 16,
    "num_attention_heads": 8,
    "token_dim": 512,
}


def test_hardening_58_no_memory(tmp_path: Path) -> None:
    """If the budget allows a load and the machine has no memory, the answer is 507, others are served, and later the
    load succeeds."""
    with running_server(tmp_path / "data") as server:
        client = server.client()
        flat = torch.randn((1024, 16384), generator=torch.Generator().manual_seed(0))
        assert upload(client, "acme", "large", LARGE, save({"prompt_embeddings": flat})).status_code == 201
        assert upload(client, "acme", "small").status_code == 201
        pid = server.process.pid
        unlimited = resource.prlimit(pid, resource.RLIMIT_AS)
        resource.prlimit(pid, resource.RLIMIT_AS, (_virtual_memory(pid) + (40 << 20), unlimited[1]))
        body = problem(client.get("/v1/tenants/acme/adapters/large/prefix"), 507, "out-of-space")
        assert "no memory left for acme/large@1" in body["detail"]
        assert client.get("/v1/tenants/acme/adapters/small/prefix").status_code == 200
        resource.prlimit(pid, resource.RLIMIT_AS, unlimited)
        assert client.get("/v1/tenants/acme/adapters/large/prefix").status_code == 200
        assert_alive(server)


def _virtual_memory(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
    return pages * resource.getpagesize()


def test_hardening_59_a_storm_on_a_broken_adapter(small: Server) -> None:
    """A broken adapter is read once in a while, not once a request; others are served; once it is mended, it is served
    immediately."""
    admin = small.client()
    upload(admin, "storm", "broken")
    blobs = FolderBlobStore(small.data_dir / "blobs")
    for blob in blobs.listed():
        blobs.path(blob.digest).write_bytes(b"rotten")
    upload(admin, "storm", "sound", file=weights(1))
    path = "/v1/tenants/storm/adapters/broken/prefix"

    def ask(_: int) -> httpx.Response:
        return small.client().get(path)

    began, before = time.monotonic(), _failures(admin)
    with ThreadPoolExecutor(8) as pool:
        for answer in pool.map(ask, range(200)):
            problem(answer, 503, "corrupt-blob")
            assert int(answer.headers["retry-after"]) > 0
    rounds = 1 + int((time.monotonic() - began) / REMEMBERED_SECONDS)
    assert 1 <= _failures(admin) - before <= rounds
    assert admin.get("/v1/tenants/storm/adapters/sound/prefix").status_code == 200
    assert upload(admin, "storm", "broken").status_code == 200
    assert admin.get(path).status_code == 200


def _failures(admin: httpx.Client) -> int:
    """Returns how many loads from the store failed."""
    found: int = admin.get("/v1/residency").json()["tiers"][0]["failures"]
    return found
