"""Listings of versions, keys and residency come in pages that are bounded in items and bytes."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import httpx
import pytest
import sqlalchemy as sa

from prefix_service.api.dependencies.pagination import NAMES, cursor_of
from prefix_service.catalog.schema import versions
from prefix_service.library.pages import PAGE_BYTES
from tests.api.helpers import problem, upload, weights
from tests.conftest import Server, running_server

TENANT = "listings"
ADAPTERS = f"/v1/tenants/{TENANT}-sorted/adapters"
VERSIONS = f"/v1/tenants/{TENANT}/adapters/a/versions"
KEYS = f"/v1/tenants/{TENANT}/keys"


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Yields a service with seven versions of one adapter, aliases, and five keys; all versions are in memory."""
    with running_server(tmp_path_factory.mktemp("listings") / "data") as server:
        client = server.client()
        for seed in range(7):
            assert upload(client, TENANT, "a", file=weights(seed)).status_code == 201
            assert client.put(f"/v1/tenants/{TENANT}/adapters/a@{seed + 1}/residency").status_code == 200
        for alias, number in (("prod", 3), ("old", 3), ("next", 7)):
            client.put(f"/v1/tenants/{TENANT}/adapters/a/aliases/{alias}", json={"version": number})
        for name in "abcde":
            client.post(KEYS, json={"scope": "read", "name": name})
        for name in ("small", "s_all", "other", "smaller"):
            for seed in range(3 if name == "other" else 1):
                assert upload(client, f"{TENANT}-sorted", name, file=weights(seed)).status_code == 201
        yield server


def followed(client: httpx.Client, path: str, limit: int, name: str = "items", **query: str) -> list[dict[str, Any]]:
    """Returns every item, page by page along the Link header, which must agree with `next`."""
    found: list[dict[str, Any]] = []
    url: str | None = f"{path}?{urlencode({'limit': limit, **query})}"
    while url is not None:
        answer = client.get(url)
        assert answer.status_code == 200, answer.text
        page = answer.json()
        assert len(page[name]) <= limit
        assert (page["next"] is None) == ("link" not in answer.headers)
        found += page[name]
        url = answer.links["next"]["url"] if "link" in answer.headers else None
        assert url is None or f"cursor={page['next']}" in url
    return found


@pytest.mark.parametrize("limit", [1, 3, 7, 1000])
def test_versions_come_in_pages(own: Server, limit: int) -> None:
    """Versions come newest first, each once, with the aliases that point at it."""
    found = followed(own.client(), VERSIONS, limit)
    assert [item["version"] for item in found] == [7, 6, 5, 4, 3, 2, 1]
    assert {item["version"]: item["aliases"] for item in found if item["aliases"]} == {3: ["old", "prod"], 7: ["next"]}


def test_a_deletion_moves_no_page(own: Server) -> None:
    """A cursor is a place and not a count, so a deletion skips and repeats nothing."""
    client = own.client()
    for seed in (20, 21, 22):
        upload(client, TENANT, "b", file=weights(seed))
    path = VERSIONS.replace("/a/", "/b/")
    first = client.get(path, params={"limit": 2}).json()
    assert client.delete(f"/v1/tenants/{TENANT}/adapters/b@2").status_code == 204
    rest = client.get(path, params={"limit": 2, "cursor": first["next"]}).json()
    assert [item["version"] for item in rest["items"]] == [1]


@pytest.mark.parametrize("limit", [1, 2, 5, 1000])
def test_keys_come_in_pages(own: Server, limit: int) -> None:
    """Keys come oldest first, each once; those of one moment in the order of their ids."""
    found = followed(own.client(), KEYS, limit)
    assert found == sorted(found, key=lambda key: (key["created"], key["id"]))
    assert sorted(key["name"] for key in found) == list("abcde")
    assert len(followed(own.client(), "/v1/keys", limit)) == 1


@pytest.mark.one_process("what is in memory is each replica's own")
@pytest.mark.parametrize("limit", [1, 3, 1000])
def test_residency_comes_in_pages(own: Server, limit: int) -> None:
    """Versions come largest first, each once; every page has the budgets, and at most `limit` tenants."""
    client = own.client()
    found = followed(client, "/v1/residency", limit, "resident")
    mine = [row["version"] for row in found if row["tenant"] == TENANT]
    assert sorted(mine) == list(range(1, 8))
    sizes = [row["device_bytes"] + row["host_bytes"] for row in found]
    assert sizes == sorted(sizes, reverse=True)
    page = client.get("/v1/residency", params={"limit": limit}).json()
    for tier in ("device", "host"):
        assert len([share for share in page["tenants"] if share["tier"] == tier]) <= limit
    assert [tier["name"] for tier in page["tiers"]] == ["device", "host"]


@pytest.mark.parametrize("limit", [1, 3, 1000])
def test_adapters_are_sorted(own: Server, limit: int) -> None:
    """Adapters are sorted by name, latest publication or bytes, and each comes once over all pages."""
    client = own.client()
    names = ["other", "s_all", "small", "smaller"]
    assert [item["adapter"] for item in followed(client, ADAPTERS, limit, sort="name")] == names
    by_bytes = followed(client, ADAPTERS, limit, sort="-bytes")
    assert [item["adapter"] for item in by_bytes] == names
    assert by_bytes[0]["bytes"] == 3 * by_bytes[1]["bytes"] > 3 * sum(by_bytes[1]["latest"]["size"].values())
    newest = followed(client, ADAPTERS, limit, sort="-created")
    moments = [item["latest"]["created"] for item in newest]
    assert moments == sorted(moments, reverse=True)
    assert sorted(item["adapter"] for item in newest) == names


def test_adapters_are_searched(own: Server) -> None:
    """A search finds a part of the name, has no wildcards, and works in every order and over pages."""
    client = own.client()
    for search, found in (
        ("mall", ["small", "smaller"]),
        ("SMALL", ["small", "smaller"]),
        ("_", ["s_all"]),
        ("%", []),
        ("", ["other", "s_all", "small", "smaller"]),
    ):
        for sort in ("name", "-bytes", "-created"):
            listed = followed(client, ADAPTERS, 1, search=search, sort=sort)
            assert sorted(item["adapter"] for item in listed) == found, (search, sort)
    problem(client.get(ADAPTERS, params={"search": "x" * 65}), 422, "invalid-request")
    nothing = client.get(ADAPTERS, params={"search": "mall", "base_model": "none"}).json()
    assert nothing == {"items": [], "next": None}


@pytest.mark.parametrize("sort", ["", "bytes", "-name", "used", "created; DROP TABLE versions"])
def test_orders_that_there_are_not(own: Server, sort: str) -> None:
    """An unknown order is a 422."""
    problem(own.client().get(ADAPTERS, params={"sort": sort}), 422, "invalid-request")


@pytest.mark.parametrize(
    ("sort", "place"),
    [
        ("name", "7 small"),
        ("name", " small"),
        ("name", "2026-11-26T12:00:00 small"),
        ("-bytes", "small"),
        ("-bytes", "2026-11-26T12:00:00 small"),
        ("-bytes", "1234567890123456789 small"),
        ("-bytes", "-7 small"),
        ("-bytes", "7 Small"),
        ("-created", "small"),
        ("-created", "7 small"),
        ("-created", "2026-11-26 12:00:00 small"),
        ("-created", "2026-11-26T12:00:00+00:00 small"),
        ("-created", "2026-11-26T12:00:00 "),
    ],
)
def test_cursors_of_another_order(own: Server, sort: str, place: str) -> None:
    """A cursor belongs to the order of its listing; in another it is a 422."""
    answer = own.client().get(ADAPTERS, params={"sort": sort, "cursor": cursor_of(place, NAMES)})
    problem(answer, 422, "invalid-request")


@pytest.mark.parametrize("place", ["", "x", "a b c", "9" * 19, "1 a b 1 sha256:x", "2026-01-01 x", "../a"])
@pytest.mark.parametrize("path", [VERSIONS, KEYS, "/v1/keys", "/v1/residency"])
def test_cursors_that_no_listing_gave(own: Server, path: str, place: str) -> None:
    """A cursor that no listing gave is a 422, whatever it decodes to."""
    problem(own.client().get(path, params={"cursor": cursor_of(place, NAMES)}), 422, "invalid-request")


@pytest.mark.parametrize("limit", ["0", "1001", "x", "-1"])
@pytest.mark.parametrize("path", [VERSIONS, KEYS, "/v1/residency"])
def test_limits_are_bounded(own: Server, path: str, limit: str) -> None:
    """A limit is from 1 to 1,000."""
    problem(own.client().get(path, params={"limit": limit}), 422, "invalid-request")


def copied(server: Server, count: int, base_model: str) -> None:
    """Makes so many copies of the service's one version, each with a long name of its base model."""
    with server.writing() as catalog:
        values = dict(catalog.execute(sa.select(versions)).mappings().one())
        manifest = json.loads(values["manifest"])
        manifest["config"]["base_model_name_or_path"] = base_model
        values |= {"manifest": json.dumps(manifest), "base_model": base_model}
        changes = [{"id": 1000 + n, "number": 1000 + n, "digest": f"sha256:{n}"} for n in range(count)]
        catalog.execute(sa.insert(versions), [values | change for change in changes])


def test_a_page_is_bounded_in_bytes(tmp_path: Path) -> None:
    """A page ends with the item that fills it, whatever the limit, and the next pages have the rest."""
    with running_server(tmp_path / "data") as server:
        client = server.client()
        assert upload(client, TENANT, "a").status_code == 201
        copied(server, 300, "x" * 30_000)
        first = client.get(VERSIONS, params={"limit": 1000})
        assert PAGE_BYTES <= len(first.content) < PAGE_BYTES + 40_000
        found = followed(client, VERSIONS, 1000)
        assert [item["version"] for item in found] == [*range(1299, 999, -1), 1]
        metadata = client.get(f"/v2/models/{TENANT}/a").json()
        assert metadata["versions"] == ["1", *map(str, range(1000, 1300))]


def test_metadata_names_the_newest_thousand_versions(tmp_path: Path) -> None:
    """A model's metadata has its newest thousand versions, and older ones can be read."""
    with running_server(tmp_path / "data") as server:
        client = server.client()
        assert upload(client, TENANT, "a").status_code == 201
        copied(server, 1200, "x")
        metadata = client.get(f"/v2/models/{TENANT}/a").json()
        assert metadata["versions"] == list(map(str, range(1200, 2200)))
        assert client.get(f"/v2/models/{TENANT}/a/versions/1").status_code == 200
        assert client.post(f"/v2/repository/models/{TENANT}/a/unload").status_code == 200
