"""Usage over HTTP counts each kind of request, for those who may see it, in pages."""

import contextlib
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from prefix_service.api.app import create_app
from prefix_service.api.middleware import usage_counts
from prefix_service.data_folder.opening import bootstrap_file, opened
from prefix_service.settings import Settings
from tests.api.apps import served
from tests.api.helpers import CONFIG, problem, upload, weights

TOKENS = CONFIG["num_virtual_tokens"]
PREFIX = "/v1/tenants/acme/adapters/a/prefix"


class Service:
    """An app of this process that writes usage immediately; acme has a reader's and an admin's key."""

    def __init__(self, url: str, bootstrap: str, clients: contextlib.ExitStack) -> None:
        self._url, self._clients = url, clients
        self.platform = self.client(bootstrap)
        self.platform.get("/v1/tenants").raise_for_status()
        for adapter in ("a", "b"):
            assert upload(self.platform, "acme", adapter).status_code == 201
        made = {scope: self._key("acme", scope) for scope in ("read", "admin")}
        self.reader, self.admin = (self.client(made[scope]["key"]) for scope in ("read", "admin"))
        self.reader_id: str = made["read"]["id"]

    def client(self, key: str) -> httpx.Client:
        client = httpx.Client(base_url=self._url, headers={"Authorization": f"Bearer {key}"}, timeout=30)
        return self._clients.enter_context(client)

    def _key(self, tenant: str, scope: str) -> dict[str, Any]:
        made: dict[str, Any] = self.platform.post(f"/v1/tenants/{tenant}/keys", json={"scope": scope}).json()
        return made

    def usage(self, requests: int, **query: str) -> list[dict[str, Any]]:
        """Returns the tenant's usage, once it has so many requests."""
        until = time.monotonic() + 60
        while True:
            items: list[dict[str, Any]] = self.admin.get("/v1/tenants/acme/usage", params=query).json()["items"]
            if sum(item["requests"] for item in items) >= requests or time.monotonic() > until:
                return items
            time.sleep(0.05)


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    hour = usage_counts._this_hour()
    monkeypatch.setattr(usage_counts, "_this_hour", lambda: hour)  # none changes during a test
    monkeypatch.setattr(usage_counts, "_PAUSE", 0.05)
    settings = Settings(data_dir=tmp_path / "data")
    with opened(settings), served(create_app(settings)) as url, contextlib.ExitStack() as clients:
        yield Service(url, bootstrap_file(settings.data_dir).read_text().strip(), clients)


def only(items: list[dict[str, Any]], *names: str) -> list[tuple[Any, ...]]:
    return [tuple(item[name] for name in names) for item in items]


def test_the_most_used_come_first(service: Service) -> None:
    """Adapters are listed by written usage, and the order continues after a cursor."""
    listing = "/v1/tenants/acme/adapters"
    for _ in range(2):
        service.reader.get(PREFIX.replace("/a/", "/b/")).raise_for_status()
    service.reader.get(PREFIX).raise_for_status()
    service.usage(3)
    first = service.reader.get(listing, params={"sort": "-used", "limit": 1}).json()
    assert only(first["items"], "adapter", "used") == [("b", 2)]
    last = service.reader.get(listing, params={"sort": "-used", "cursor": first["next"]}).json()
    assert (only(last["items"], "adapter", "used"), last["next"]) == ([("a", 1)], None)
    wrong = service.reader.get(listing, params={"sort": "-created", "cursor": first["next"]})
    problem(wrong, 422, "invalid-request")


def test_what_requests_count(service: Service) -> None:
    """A body counts its bytes and tokens, the first one a load; 304 and HEAD count as requests alone."""
    first = service.reader.get(PREFIX, params={"batch_size": "4"})
    again = service.reader.get(PREFIX, params={"batch_size": "4"})
    etag = {"If-None-Match": first.headers["etag"]}
    assert service.reader.get(PREFIX, params={"batch_size": "4"}, headers=etag).status_code == 304
    assert service.reader.head(PREFIX).status_code == 200
    masked = service.reader.post(PREFIX, json={"attention_mask": [[1, 1], [0, 1]]})
    parts = [service.reader.get(PREFIX, headers={"Range": text}) for text in ("bytes=0-9", "bytes=10-29")]
    assert [part.status_code for part in parts] == [206, 206]
    problem(service.reader.get(PREFIX, params={"batch_size": "0"}), 422)
    problem(service.reader.get("/v1/tenants/acme/adapters/none/prefix"), 404)
    (item,) = service.usage(7, by="version,key")
    sent = len(first.content) + len(again.content) + len(masked.content) + 30
    hour = datetime.fromisoformat(item.pop("hour"))
    assert datetime.now(UTC) - hour < timedelta(hours=1, seconds=30)
    assert (hour.minute, hour.second) == (0, 0)
    assert item == {
        "tenant": "acme",
        "adapter": "a",
        "version": 1,
        "key": service.reader_id,
        "requests": 7,
        "bytes": sent,
        "cold_loads": 1,
        "prefix_tokens": (4 + 4 + 2 + 1) * TOKENS,
    }


def test_batches_for_many_adapters_and_inference(service: Service) -> None:
    """A batch counts for each of its adapters, and the platform's keys count as one."""
    rows = {"rows": ["acme/a", None, ["acme/b", "acme/a"], "acme/b"], "dtype": "float32"}
    mixed = service.platform.post("/v1/prefixes", json=rows)
    assert mixed.status_code == 200
    body = {"inputs": [{"name": "batch_size", "shape": [1], "datatype": "INT32", "data": [3]}]}
    inferred = service.reader.post("/v2/models/acme%2Fb/infer", json=body)
    assert inferred.status_code == 200
    items = service.usage(3, by="adapter,key")
    assert only(items, "adapter", "version", "key", "requests", "cold_loads", "prefix_tokens") == [
        ("a", None, "platform", 1, 1, 2 * TOKENS),
        ("b", None, service.reader_id, 1, 0, 3 * TOKENS),
        ("b", None, "platform", 1, 1, 2 * TOKENS),
    ]
    of_b = service.admin.get("/v1/tenants/acme/usage", params={"by": "adapter,key", "adapter": "b"}).json()["items"]
    assert of_b == items[1:]
    problem(service.admin.get("/v1/tenants/acme/usage", params={"adapter": "B/"}), 422, "invalid-reference")
    assert items[0]["bytes"] + items[2]["bytes"] == len(mixed.content)
    assert items[1]["bytes"] == len(inferred.content)


def test_who_sees_it(service: Service) -> None:
    """A tenant's admin sees its own usage, and a platform admin all, with the platform's keys apart."""
    service.platform.get(PREFIX).raise_for_status()
    service.reader.get(PREFIX).raise_for_status()
    assert only(service.usage(2, by="key"), "key") == [(service.reader_id,), ("platform",)]
    items = service.platform.get("/v1/usage", params={"by": "key"}).json()["items"]
    own = service.platform.get("/v1/keys").json()["items"][0]["id"]
    assert {item["key"] for item in items} == {service.reader_id, own}
    assert only(service.platform.get("/v1/usage").json()["items"], "tenant", "key", "requests") == [("acme", None, 2)]
    problem(service.reader.get("/v1/tenants/acme/usage"), 403)
    problem(service.admin.get("/v1/usage"), 403)
    service.platform.put("/v1/tenants/beta").raise_for_status()
    problem(service.admin.get("/v1/tenants/beta/usage"), 404)
    problem(service.platform.get("/v1/tenants/nobody/usage"), 404)


def test_hours_and_pages(service: Service) -> None:
    """`since` and `until` bound the hours, a page's cursor continues, and both listings take the same options."""
    service.reader.get(PREFIX).raise_for_status()
    service.reader.get(PREFIX.replace("/a/", "/b/")).raise_for_status()
    service.usage(2)
    now = datetime.now(UTC)
    for path, client in (("/v1/tenants/acme/usage", service.admin), ("/v1/usage", service.platform)):
        for since, until, found in (
            (now - timedelta(hours=2), now + timedelta(hours=2), 2),
            (now + timedelta(hours=2), None, 0),
            (None, now - timedelta(hours=2), 0),
        ):
            moments = {"since": since, "until": until}
            query = {name: moment.isoformat() for name, moment in moments.items() if moment is not None}
            assert len(client.get(path, params={"by": "adapter", **query}).json()["items"]) == found
        page = client.get(path, params={"by": "adapter", "limit": "1"})
        assert only(page.json()["items"], "adapter") == [("a",)]
        following = client.get(page.links["next"]["url"]).json()
        assert (only(following["items"], "adapter"), following["next"]) == ([("b",)], None)


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ({"by": "day"}, "by names adapter, version, key, with commas between, got 'day'"),
        ({"by": "adapter,,key"}, "got ''"),
        ({"since": "yesterday"}, "since"),
        ({"since": "0001-01-01T00:00:00+14:00"}, "since lies outside the years 1 to 9999"),
        ({"cursor": "AAAA"}, "is not one that this listing gave"),
    ],
)
def test_wrong_options(service: Service, query: dict[str, str], words: str) -> None:
    """Wrong options are refused with what is wrong."""
    assert words in problem(service.admin.get("/v1/tenants/acme/usage", params=query), 422)["detail"]


def test_a_stop_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Usage that was counted a moment before a stop is there after the next start."""
    monkeypatch.setattr(usage_counts, "_PAUSE", 3600.0)  # nothing is written before the stop
    settings = Settings(data_dir=tmp_path / "data", dev=True)
    with opened(settings), served(create_app(settings)) as url, httpx.Client(base_url=url) as client:
        assert upload(client, "acme", "a", file=weights()).status_code == 201
        assert client.get(PREFIX).status_code == 200
        assert client.get("/v1/usage").json()["items"] == []
    with opened(settings), served(create_app(settings)) as url:
        (item,) = httpx.get(f"{url}/v1/usage", params={"by": "key"}).json()["items"]
    assert (item["requests"], item["key"]) == (1, "dev")
