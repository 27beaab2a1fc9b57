"""The timeline of a version has its changes and its reads in order, for its tenant's admin alone."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import httpx
import pytest

from tests.api.helpers import count_reads, problem, upload, weights
from tests.conftest import Server

TENANT = "storied"
ADAPTER = f"/v1/tenants/{TENANT}/adapters/a"


@pytest.fixture(scope="module")
def admin(server: Server) -> Iterator[httpx.Client]:
    """Two versions; an alias moved from the first to the second one; the first one was loaded and unloaded by hand."""
    client = server.client()
    assert upload(client, TENANT, "a", file=weights(0)).status_code == 201
    client.put(f"{ADAPTER}@1/residency", json={"pinned": True})
    client.put(f"{ADAPTER}/aliases/prod", json={"version": 1})
    assert upload(client, TENANT, "a", file=weights(1)).status_code == 201
    client.put(f"{ADAPTER}/aliases/prod", json={"version": 2})
    client.delete(f"{ADAPTER}@1/residency")
    yield client
    client.delete(f"/v1/tenants/{TENANT}")


def test_changes_and_reads_in_order(server: Server, admin: httpx.Client) -> None:
    """Each change with its entry in the audit; a read comes behind the changes of its hour."""
    path = f"{ADAPTER}@1/timeline"
    found = admin.get(path).json()["items"]
    kinds = ["published", "loaded", "alias-moved-here", "alias-moved-away", "unloaded"]
    assert [one["kind"] for one in found] == kinds
    assert [one["alias"] for one in found] == [None, None, "prod", "prod", None]
    audit = {one["id"]: one for one in admin.get(f"/v1/tenants/{TENANT}/audit").json()["items"]}
    assert all(one["change"] == audit[one["change"]["id"]] and one["at"] == one["change"]["at"] for one in found)
    assert found[1]["change"]["details"] == {"pinned": True}
    this = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    hours = [this + timedelta(hours=1), this - timedelta(days=91)]
    for hour in hours:
        count_reads(server, hour, TENANT, "a", 1, "k")
    found = admin.get(path).json()["items"]
    assert [one["kind"] for one in found] == [*kinds, "first-read", "last-read"]
    assert {one["at"] for one in found[-2:]} == {f"{hours[0]:%Y-%m-%dT%H:%M:%SZ}"}
    assert [one["kind"] for one in admin.get(f"{ADAPTER}@prod/timeline").json()["items"]] == [
        "published",
        "alias-moved-here",
    ]


def test_it_is_for_admins(server: Server, admin: httpx.Client) -> None:
    """Keys of the platform are one to the tenant, as in its audit; a writer gets nothing."""
    made = {
        scope: admin.post(f"/v1/tenants/{TENANT}/keys", json={"scope": scope}).json()["key"]
        for scope in ("write", "admin")
    }
    problem(server.client(made["write"]).get(f"{ADAPTER}@1/timeline"), 403, "forbidden")
    own = server.client(made["admin"])
    changes = [one["change"] for one in own.get(f"{ADAPTER}@1/timeline").json()["items"] if one["change"]]
    assert {(one["key_id"], one["key_name"]) for one in changes} == {("platform", None)}
    problem(own.get("/v1/tenants/others/adapters/a@1/timeline"), 404, "not-found")
    problem(own.get(f"{ADAPTER}@9/timeline"), 404, "not-found")
