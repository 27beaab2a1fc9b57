"""The overview of memory names renderings, and advice says in words what an operator may do."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
import torch
from safetensors.torch import save

from prefix_service.catalog.schema import adapters, tenants, versions
from tests.api.helpers import CONFIG, count_reads, problem, upload
from tests.conftest import Server

TENANT = "remembered"
ADAPTERS = f"/v1/tenants/{TENANT}/adapters"
_TOKENS = 1024  # so that one head of one layer takes more than the least that an entry counts for


@pytest.fixture(scope="module")
def admin(server: Server) -> Iterator[httpx.Client]:
    """Three versions of an adapter, two of which were published eight days ago."""
    client = server.client()
    for seed in range(3):
        flat = torch.randn(_TOKENS, 32, generator=torch.Generator().manual_seed(seed))
        config = {**CONFIG, "num_virtual_tokens": _TOKENS}
        assert upload(client, TENANT, "a", config, save({"prompt_embeddings": flat})).status_code == 201
    with server.writing() as catalog:
        of_tenant = sa.select(adapters.c.id).join(tenants).where(tenants.c.name == TENANT)
        old = sa.update(versions).where(versions.c.number < 3, versions.c.adapter_id.in_(of_tenant))
        catalog.execute(old.values(created=datetime.now(UTC).replace(tzinfo=None) - timedelta(days=8)))
    yield client
    client.delete(f"/v1/tenants/{TENANT}")


def resident(client: httpx.Client) -> list[dict[str, Any]]:
    """What the tenant has in memory, by version."""
    page = client.get("/v1/residency", params={"limit": 1000}).json()
    return sorted((one for one in page["resident"] if one["tenant"] == TENANT), key=lambda one: one["version"])


@pytest.mark.one_process("what is in memory is each replica's own")
def test_renderings_are_named(admin: httpx.Client) -> None:
    """Each with its dtype, its layers and heads, its bytes and its lookups; the largest come first, and at most 8."""
    queries = ["", "", "dtype=float32", "layers=1:2&kv_heads=0:1"]
    for query in queries:
        assert admin.get(f"{ADAPTERS}/a@3/prefix?{query}").status_code == 200
    (row,) = resident(admin)
    names = ("dtype", "layers", "kv_heads", "nbytes")
    found = [tuple(one[name] for name in names) for one in row["largest_renderings"]]
    whole = 2 * 2 * 2 * 4 * _TOKENS  # numbers
    stored = row["device_bytes"] // whole
    assert found[0] == ("float32", "0:2", "0:2", 4 * whole)
    assert found[-1][1:] == ("1:2", "0:1", whole // 4 * stored)
    uses = [one["uses"] for one in row["largest_renderings"]]
    assert uses[0] > uses[-1]
    assert sum(one[3] for one in found) == row["host_bytes"]
    assert len(found) == row["renderings"]
    for dtype in ("float16", "bfloat16", "float32"):
        for layer in (0, 1):
            for head in (0, 1):
                query = f"dtype={dtype}&layers={layer}:{layer + 1}&kv_heads={head}:{head + 1}"
                assert admin.get(f"{ADAPTERS}/a@3/prefix?{query}").status_code == 200
    (row,) = resident(admin)
    assert row["renderings"] > 8 == len(row["largest_renderings"])
    sizes = [one["nbytes"] for one in row["largest_renderings"]]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.one_process("what is in memory is each replica's own")
def test_pinned_versions_that_nobody_reads(server: Server, admin: httpx.Client) -> None:
    """Those that are pinned and old enough, until the catalog has a read of the last 7 days, by whichever process."""

    def advice() -> list[dict[str, Any]]:
        items: list[dict[str, Any]] = admin.get("/v1/residency/advice").json()["items"]
        return [one for one in items if one["code"] == "pinned-unread"]

    assert advice() == []
    for number in (1, 2, 3):
        state = admin.put(f"{ADAPTERS}/a@{number}/residency", json={"pinned": True})
        assert state.json()["pinned"] is True
    (found,) = advice()
    nbytes = found["versions"][0]["nbytes"]
    assert found["text"] == (
        f"2 pinned versions unread for 7 days hold {2 * nbytes >> 10}.0 KiB on the device: unpin what is not needed."
    )
    assert (found["tier"], found["nbytes"]) == ("device", 2 * nbytes)
    assert found["versions"] == [
        {"tenant": TENANT, "adapter": "a", "version": number, "nbytes": nbytes} for number in (1, 2)
    ]
    count_reads(server, datetime.now(UTC) - timedelta(days=6), TENANT, "a", 1, "k")
    (found,) = advice()
    assert found["text"].startswith("1 pinned version unread for 7 days holds ")
    for number in (1, 2, 3):
        admin.put(f"{ADAPTERS}/a@{number}/residency", json={"pinned": False})
    assert advice() == []


def test_advice_is_for_keys_of_the_platform(server: Server, admin: httpx.Client) -> None:
    """A tenant's admin gets none of it; a reader of the platform does."""
    made = admin.post(f"/v1/tenants/{TENANT}/keys", json={"scope": "admin"}).json()
    problem(server.client(made["key"]).get("/v1/residency/advice"), 403, "forbidden")
    reader = admin.post("/v1/keys", json={"scope": "read"}).json()
    assert server.client(reader["key"]).get("/v1/residency/advice").status_code == 200
    admin.delete(f"/v1/keys/{reader['id']}")
