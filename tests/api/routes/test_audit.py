"""The audit has every change once, with its author, for the tenant's admin and for no other tenant."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.api.helpers import problem, upload, weights
from tests.conftest import Server

Entry = dict[str, Any]
TENANT = "audited"


def entries(client: httpx.Client, path: str = f"/v1/tenants/{TENANT}/audit") -> list[Entry]:
    """Returns all entries, oldest first."""
    found: list[Entry] = []
    params: dict[str, Any] = {"limit": 1000}
    while True:
        page = client.get(path, params=params).json()
        found += page["items"]
        if page["next"] is None:
            return found[::-1]
        params["cursor"] = page["next"]


@pytest.fixture(scope="module")
def admin(server: Server) -> httpx.Client:
    return server.client()


@pytest.fixture(scope="module")
def own(server: Server, admin: httpx.Client) -> Iterator[tuple[str, httpx.Client]]:
    """Yields the id of a key of the tenant's admin, and a client with it."""
    admin.put(f"/v1/tenants/{TENANT}")
    made = admin.post(f"/v1/tenants/{TENANT}/keys", json={"scope": "admin", "name": "ops"}).json()
    yield made["id"], server.client(made["key"])
    admin.delete(f"/v1/tenants/{TENANT}")


def test_every_change_is_told_once(admin: httpx.Client, own: tuple[str, httpx.Client]) -> None:
    """Each change has one entry, in order; reads, and writes that change nothing, have none."""
    key_id, client = own
    before = len(entries(client))
    base = f"/v1/tenants/{TENANT}/adapters/a"
    for _ in range(2):
        upload(client, TENANT, "a")
    upload(client, TENANT, "a", file=weights(1))
    for version in (1, 2, 2):
        client.put(f"{base}/aliases/prod", json={"version": version})
    client.get(f"{base}/prefix")
    client.put(f"{base}@1/residency", json={"pinned": True})
    client.delete(f"{base}@1/residency")
    client.delete(f"{base}/aliases/prod")
    made = client.post(f"/v1/tenants/{TENANT}/keys", json={"scope": "read", "name": "worker"}).json()
    client.delete(f"/v1/tenants/{TENANT}/keys/{made['id']}")
    client.delete(f"{base}@1")
    client.delete(base)
    admin.put(f"/v1/tenants/{TENANT}", json={"max_adapters": 7})
    admin.put(f"/v1/tenants/{TENANT}", json={"max_adapters": 7})
    found = entries(client)[before:]
    assert [(entry["action"], entry["target"]) for entry in found] == [
        ("version.published", f"{TENANT}/a@1"),
        ("version.published", f"{TENANT}/a@2"),
        ("alias.moved", f"{TENANT}/a@prod"),
        ("alias.moved", f"{TENANT}/a@prod"),
        ("residency.loaded", f"{TENANT}/a@1"),
        ("residency.unloaded", f"{TENANT}/a@1"),
        ("alias.deleted", f"{TENANT}/a@prod"),
        ("key.created", made["id"]),
        ("key.revoked", made["id"]),
        ("version.deleted", f"{TENANT}/a@1"),
        ("adapter.deleted", f"{TENANT}/a"),
        ("tenant.changed", TENANT),
    ]
    assert {(entry["actor"], entry["key_id"]) for entry in found[:-1]} == {(TENANT, key_id)}
    assert found[-1]["actor"] == "platform"
    assert {entry["tenant"] for entry in found} == {TENANT}
    assert found[3]["details"] == {"version": 2, "before": 1}
    assert all(entry["at"].endswith("Z") for entry in found)


def test_what_was_refused_is_no_change(own: tuple[str, httpx.Client]) -> None:
    """A refused request has no entry."""
    _, client = own
    before = entries(client)
    problem(client.delete(f"/v1/tenants/{TENANT}/adapters/none"), 404)
    problem(client.put(f"/v1/tenants/{TENANT}/adapters/none/aliases/prod", json={"version": 1}), 404)
    problem(upload(client, TENANT, "a", file=b"x" * 20), 422)
    problem(client.put(f"/v1/tenants/{TENANT}", json={"max_adapters": 1}), 403)
    assert entries(client) == before


def test_a_namesake_does_not_inherit(server: Server, admin: httpx.Client) -> None:
    """A tenant that is made again has a history of its own; the platform can read the old one."""
    admin.put("/v1/tenants/audited-twice")
    upload(admin, "audited-twice", "a")
    admin.delete("/v1/tenants/audited-twice")
    admin.put("/v1/tenants/audited-twice")
    assert [entry["action"] for entry in entries(admin, "/v1/tenants/audited-twice/audit")] == ["tenant.created"]
    all_of_them = [entry["action"] for entry in entries(admin, "/v1/audit") if entry["tenant"] == "audited-twice"]
    assert all_of_them == ["tenant.created", "version.published", "tenant.deleted", "tenant.created"]


def test_the_platforms_own_changes(server: Server, admin: httpx.Client) -> None:
    """Entries of platform keys have no tenant, and those of the command line name it."""
    made = admin.post("/v1/keys", json={"scope": "read"}).json()
    server.command("key", "revoke", made["id"], "--platform")
    last = entries(admin, "/v1/audit")[-2:]
    assert [(entry["action"], entry["tenant"], entry["target"]) for entry in last] == [
        ("key.created", None, made["id"]),
        ("key.revoked", None, made["id"]),
    ]
    assert last[1]["key_id"] == "command-line"


def test_a_tenant_sees_no_id_and_no_name_of_a_platforms_key(
    server: Server, admin: httpx.Client, own: tuple[str, httpx.Client]
) -> None:
    """The platform sees them. A search finds by an id or a name only who may see it."""
    platform_id = admin.get("/v1/whoami").json()["id"]
    admin.put(f"/v1/tenants/{TENANT}", json={"max_adapters": 5})
    seen, known = entries(own[1]), entries(admin, f"/v1/tenants/{TENANT}/audit")
    assert platform_id not in str(seen)
    ids = {entry["key_id"] for entry in seen if entry["actor"] == "platform"}
    assert ids == {"platform"}
    assert {entry["key_name"] for entry in seen if entry["actor"] == "platform"} == {None}
    assert (platform_id, "bootstrap") in {(entry["key_id"], entry["key_name"]) for entry in known}
    for text in (platform_id, "bootstrap"):
        assert found(own[1], search=text) == []
        assert len(found(admin, search=text)) > 0
    assert [entry["id"] for entry in found(own[1], search="PLATFORM")] == [
        entry["id"] for entry in seen[::-1] if entry["actor"] == "platform"
    ]


def found(client: httpx.Client, **parameters: str) -> list[Entry]:
    """Returns the tenant's entries that match, newest first, with pages of two."""
    path, matching = f"/v1/tenants/{TENANT}/audit", list[Entry]()
    answer = client.get(path, params={"limit": 2, **parameters})
    while True:
        matching += answer.json()["items"]
        if not (following := answer.headers.get("link", "").partition(">")[0].removeprefix("<")):
            return matching
        answer = client.get(following)


def test_it_is_filtered(server: Server, admin: httpx.Client, own: tuple[str, httpx.Client]) -> None:
    """By an action, and by a text in target, tenant, actor, key id or key name, over all pages."""
    key_id, client = own
    base = f"/v1/tenants/{TENANT}/adapters/filtered"
    for seed, name in enumerate(("of_it", "of%it")):
        made = client.post(f"/v1/tenants/{TENANT}/keys", json={"scope": "write", "name": name}).json()
        upload(server.client(made["key"]), TENANT, "filtered", file=weights(seed))
        client.put(f"{base}/aliases/prod", json={"version": 1})
        client.delete(f"{base}/aliases/prod")
        matching = [(entry["target"], entry["key_id"]) for entry in found(client, search=name.upper())]
        assert matching == [(f"{TENANT}/filtered@{seed + 1}", made["id"])]
        assert found(client, search=made["id"], action="key.created")[0]["target"] == made["id"]
    everything = entries(client)[::-1]
    for action in ("alias.moved", "key.created", "version.published"):
        wanted = [entry for entry in everything if entry["action"] == action]
        assert len(wanted) > 1
        assert found(client, action=action) == wanted
    targets = [entry["target"] for entry in found(client, search="FILTERED@", action="alias.deleted")]
    assert targets == [f"{TENANT}/filtered@prod"] * 2
    by_id = [entry for entry in everything if key_id in (entry["key_id"], entry["target"])]
    assert found(client, search=key_id) == by_id
    assert found(client, search="OPS") == [entry for entry in everything if entry["key_name"] == "ops"]
    assert found(client, action="alias") == []
    assert found(admin, search=TENANT) == entries(admin)[::-1]


@pytest.mark.parametrize("name", ["action", "search"])
def test_long_filters(own: tuple[str, httpx.Client], name: str) -> None:
    """A filter of more than 64 characters is a 422."""
    problem(own[1].get(f"/v1/tenants/{TENANT}/audit", params={name: "x" * 65}), 422, "invalid-request")


def test_it_holds_no_secret(server: Server, own: tuple[str, httpx.Client]) -> None:
    """An entry has a key's id, and never its text."""
    _, client = own
    made = client.post(f"/v1/tenants/{TENANT}/keys", json={"scope": "read"}).json()
    told = client.get(f"/v1/tenants/{TENANT}/audit").text
    assert made["id"] in told
    assert made["key"].split("_")[2] not in told


def test_it_comes_in_pages(own: tuple[str, httpx.Client]) -> None:
    """The audit lists the newest first, each entry once, with a Link to older ones."""
    _, client = own
    for _ in range(5):
        made = client.post(f"/v1/tenants/{TENANT}/keys", json={"scope": "read"}).json()
        client.delete(f"/v1/tenants/{TENANT}/keys/{made['id']}")
    whole = [entry["id"] for entry in entries(client)][::-1]
    found, path = [], f"/v1/tenants/{TENANT}/audit?limit=3"
    while path:
        answer = client.get(path)
        found += [item["id"] for item in answer.json()["items"]]
        path = answer.headers.get("link", "").partition(">")[0].removeprefix("<")
    assert found == whole
    assert len(set(whole)) == len(whole)


@pytest.mark.parametrize("cursor", ["x", "YQ", "", "17", "0" * 32, "A" * 32, "\u0661" * 32])
def test_cursors_that_it_did_not_give(own: tuple[str, httpx.Client], cursor: str) -> None:
    """A cursor that the audit did not give is a 422."""
    problem(own[1].get(f"/v1/tenants/{TENANT}/audit", params={"cursor": cursor}), 422, "invalid-request")


def test_it_is_for_admins(server: Server, own: tuple[str, httpx.Client]) -> None:
    """A tenant's other keys cannot read its audit, and its admin reads neither another tenant's nor the platform's."""
    _, client = own
    for scope in ("read", "write"):
        key = client.post(f"/v1/tenants/{TENANT}/keys", json={"scope": scope}).json()["key"]
        problem(server.client(key).get(f"/v1/tenants/{TENANT}/audit"), 403, "forbidden")
    problem(client.get("/v1/audit"), 403, "forbidden")
    problem(client.get("/v1/tenants/auth-other/audit"), 404, "not-found")
