"""`GET /v1/changes`: who sees which changes, who waits for them, and when the waiting ends."""

import json
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import sqlalchemy as sa

from prefix_service.catalog.changes import catalog_id
from prefix_service.catalog.database import Database
from prefix_service.catalog.schema import changes
from tests.api.helpers import problem, upload
from tests.conftest import Server, running_server

PATH = "/v1/changes"
MOST = 16  # watchers; four of one tenant
STREAM = {"Accept": "text/event-stream"}


@dataclass
class Watched:
    """A service with two tenants, and clients with keys of different owners and scopes."""

    server: Server
    admin: httpx.Client
    clients: dict[str, httpx.Client]

    def now(self, whose: str) -> str:
        """The present revision, as the owner of a key is told it."""
        return str(self.page(whose)["revision"])

    def page(self, whose: str, since: str | None = None) -> dict[str, Any]:
        client = self.admin if whose == "platform" else self.clients[whose]
        answer = client.get(PATH, params={} if since is None else {"since": since})
        assert answer.status_code == 200, answer.text
        page: dict[str, Any] = answer.json()
        return page

    def move(self, tenant: str, alias: str = "prod") -> None:
        """Change something of a tenant."""
        assert self.admin.put(f"/v1/tenants/{tenant}/adapters/a/aliases/{alias}", json={"version": 1}).is_success
        assert self.admin.delete(f"/v1/tenants/{tenant}/adapters/a/aliases/{alias}").is_success


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    limits = {"PREFIX_MAX_WATCHERS": str(MOST)}
    with running_server(tmp_path_factory.mktemp("changes") / "data", environment=limits) as server:
        admin = server.client()
        clients: dict[str, httpx.Client] = {}
        for tenant in ("acme", "beta"):
            assert upload(admin, tenant, "a").status_code == 201
            for scope in ("read", "admin"):
                key = admin.post(f"/v1/tenants/{tenant}/keys", json={"scope": scope}).json()["key"]
                clients[f"{tenant} {scope}"] = server.client(key)
        yield Watched(server, admin, clients)


def kinds(page: dict[str, Any]) -> list[str]:
    return [item["kind"] for item in page["items"]]


def test_changes_since_a_revision(watched: Watched) -> None:
    """Oldest first, with the names that each kind has; the answer's revision goes on from there."""
    before = watched.page("acme read")
    assert before["items"] == []
    version = upload(watched.admin, "acme", "b").json()
    watched.admin.put("/v1/tenants/acme/adapters/b/aliases/prod", json={"version": 1})
    page = watched.page("acme read", before["revision"])
    common = {"tenant": "acme", "adapter": "b", "version": 1, "digest": version["digest"], "key": None}
    found = [
        {name: value for name, value in item.items() if name not in ("revision", "time")} for item in page["items"]
    ]
    assert found == [
        {"kind": "version-published", "alias": None, **common},
        {"kind": "alias-moved", "alias": "prod", **common},
    ]
    assert page["items"][0]["time"].endswith("Z")
    between = watched.page("acme read", page["items"][0]["revision"])
    assert kinds(between) == ["alias-moved"]
    watched.admin.delete("/v1/tenants/acme/adapters/b")
    assert kinds(watched.page("acme read", page["revision"])) == ["adapter-deleted"]


def test_a_key_sees_its_tenant_and_the_platform_all(watched: Watched) -> None:
    """Keys and quotas are for admins."""
    owners = ("acme read", "acme admin", "beta read", "platform")
    before = {whose: watched.now(whose) for whose in owners}
    watched.admin.post("/v1/tenants/acme/keys", json={"scope": "read"})
    watched.admin.put("/v1/tenants/acme", json={"max_adapters": 99})
    for tenant in ("acme", "beta"):
        watched.move(tenant)
    moved = ["alias-moved", "alias-deleted"]
    found = {whose: watched.page(whose, before[whose]) for whose in owners}
    assert kinds(found["acme read"]) == kinds(found["beta read"]) == moved
    assert {item["tenant"] for item in found["beta read"]["items"]} == {"beta"}
    assert kinds(found["acme admin"]) == ["key-created", "quotas-changed", *moved]
    assert len(found["acme admin"]["items"][0]["key"]) == 16
    assert kinds(found["platform"]) == ["key-created", "quotas-changed", *moved, *moved]


def test_revisions_say_nothing_of_others(watched: Watched) -> None:
    """Each text is another, whether or not anything changed; another tenant's is refused, as is any other text."""
    assert len({watched.now("acme read") for _ in range(4)}) == 4
    acme, client = watched.now("acme read"), watched.clients["beta read"]
    for text in (acme, watched.now("platform"), "0" * 32):
        problem(client.get(PATH, params={"since": text}), 422, "invalid-request")
    assert client.get(PATH, headers={**STREAM, "Last-Event-ID": acme}).status_code == 422


def test_the_answer_waits_for_a_change(watched: Watched) -> None:
    """One of the key's tenant; others' do not end the wait."""
    before = watched.now("acme read")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(watched.page, "acme read", before)
        watched.move("beta")
        watched.move("acme")
        page = waiting.result(30)
    assert page["items"]
    assert {item["tenant"] for item in page["items"]} == {"acme"}


def test_what_is_no_longer_kept_is_gone(watched: Watched) -> None:
    """410 tells a caller to read everything again."""
    before = watched.now("acme read")
    for _ in range(2):
        watched.move("acme")
    database = Database(watched.server.data_dir / "catalog.sqlite")
    with database.writing() as connection:
        latest = sa.select(sa.func.max(changes.c.revision)).scalar_subquery()
        connection.execute(sa.delete(changes).where(changes.c.revision < latest))
    database.close()
    for headers in ({}, STREAM):
        answer = watched.clients["acme read"].get(PATH, params={"since": before}, headers=headers)
        problem(answer, 410, "gone")
    watched.now("acme read")


@contextmanager
def streaming(client: httpx.Client, **headers: str) -> Iterator[Iterator[str]]:
    """The lines of a stream of events."""
    with client.stream("GET", PATH, headers={**STREAM, **headers}) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert "content-length" not in answer.headers
        yield answer.iter_lines()


def event(lines: Iterator[str]) -> tuple[str, dict[str, Any] | None]:
    """The next event's id and data; without data it says where to go on from."""
    found = dict(line.split(": ", 1) for line in iter(lambda: next(lines), ""))
    return found["id"], json.loads(found["data"]) if "data" in found else None


def changed(lines: Iterator[str]) -> dict[str, Any]:
    """The next change in a stream."""
    while True:
        revision, found = event(lines)
        if found is not None:
            assert found["revision"] == revision
            return found


def test_a_stream_of_events(watched: Watched) -> None:
    """Each with its revision as id, from which another stream goes on."""
    client = watched.clients["acme read"]
    with streaming(client) as lines:
        begin, found = event(lines)
        assert found is None
        watched.move("beta")
        watched.move("acme")
        moved = changed(lines)
        assert (moved["kind"], moved["tenant"], moved["alias"]) == ("alias-moved", "acme", "prod")
        assert changed(lines)["kind"] == "alias-deleted"
    with streaming(client, **{"Last-Event-ID": begin}) as lines:
        assert [changed(lines)["kind"] for _ in range(2)] == ["alias-moved", "alias-deleted"]
    with streaming(client, **{"Last-Event-ID": moved["revision"]}) as lines:
        assert changed(lines)["kind"] == "alias-deleted"


@pytest.mark.parametrize("end", ["revoked", "tenant deleted"])
def test_a_stream_ends_with_its_key(watched: Watched, end: str) -> None:
    """Its reader finds the end of the body, and 401 when it comes again. So does a caller who waits for a page. A look
    that began before may still find that the tenant was deleted."""
    assert upload(watched.admin, "gamma", "a").is_success
    made = watched.admin.post("/v1/tenants/gamma/keys", json={"scope": "read"}).json()
    client = watched.server.client(made["key"])
    since = client.get(PATH).json()["revision"]
    with ThreadPoolExecutor(1) as pool, streaming(client) as lines:
        event(lines)
        waiting = pool.submit(client.get, PATH, params={"since": since})
        gone = f"/v1/tenants/gamma/keys/{made['id']}" if end == "revoked" else "/v1/tenants/gamma"
        assert watched.admin.delete(gone).status_code == 204
        seen = [json.loads(line.removeprefix("data: "))["kind"] for line in lines if line.startswith("data: ")]
        answer = waiting.result(30)
    assert seen in ([], ["tenant-deleted"])
    assert answer.status_code == 401 or kinds(answer.json()) == ["tenant-deleted"]
    assert client.get(PATH).status_code == 401


def test_a_write_says_its_revision(watched: Watched) -> None:
    """The changes after it are those that came later. Reads and refused writes say none."""
    path = "/v1/tenants/acme/adapters/a"
    client = watched.clients["acme admin"]
    moved = client.put(f"{path}/aliases/dev", json={"version": 1})
    revision = moved.headers["prefix-revision"]
    assert client.delete(f"{path}/aliases/dev").headers["prefix-revision"]
    assert kinds(watched.page("acme read", revision)) == ["alias-deleted"]
    silent = [
        client.get(path),
        client.post(f"{path}/prefix", json={}),
        client.delete(f"{path}/aliases/dev"),
        client.put("/v1/tenants/acme", json={}),
    ]
    assert [answer.status_code for answer in silent] == [200, 200, 404, 403]
    assert ["prefix-revision" in answer.headers for answer in silent] == [False] * 4


def test_a_read_may_ask_for_a_revision(watched: Watched) -> None:
    """One that a key of the same tenant got; any other text is refused."""
    revision = watched.now("acme read")
    client = watched.clients["acme read"]
    for path in ("/v1/tenants/acme/adapters/a/prefix", "/v1/tenants/acme/adapters", "/v2/models/acme/a"):
        refused = 400 if path.startswith("/v2") else 422
        for text, status in ((revision, 200), ("0", refused), (watched.now("beta read"), refused)):
            assert client.get(path, headers={"Prefix-Min-Revision": text}).status_code == status


def test_every_answer_names_the_catalog(watched: Watched) -> None:
    """By the id that the catalog keeps, whatever is answered."""
    database = Database(watched.server.data_dir / "catalog.sqlite")
    with database.reading() as connection:
        expected = catalog_id(connection)
    database.close()
    path = "/v1/tenants/acme/adapters/a/prefix"
    tag = watched.admin.get(path).headers["etag"]
    answers = [
        watched.server.client("").get("/livez"),
        watched.server.client("").get(path),
        watched.admin.get(path),
        watched.admin.get(path, headers={"If-None-Match": tag}),
        watched.admin.get("/v1/none"),
        watched.admin.put("/v1/tenants/acme", json={}),
    ]
    assert [answer.status_code for answer in answers] == [200, 401, 200, 304, 404, 200]
    assert {answer.headers["prefix-catalog"] for answer in answers} == {expected}


def test_watchers_are_bounded(watched: Watched) -> None:
    """A tenant may be a quarter of them, its other requests do not count, and other tenants have their own."""
    client = watched.clients["beta read"]
    with ExitStack() as stack:
        held = [stack.enter_context(streaming(client)) for _ in range(MOST // 4)]
        for lines in held:
            event(lines)
        refused = client.get(PATH, headers=STREAM)
        problem(refused, 503, "overloaded")
        assert refused.headers["retry-after"] == "10"
        assert client.get(PATH).status_code == 503
        assert client.get("/v1/tenants/beta/adapters").status_code == 200
        held.append(stack.enter_context(streaming(watched.clients["acme read"])))
        event(held[-1])
    until_free(client)


def until_free(client: httpx.Client) -> None:
    """The service notices within moments that its watchers have left."""
    for _ in range(3000):
        if client.get(PATH).status_code == 200:
            return
    raise AssertionError("watchers that left still count")


def test_only_what_is_offered_is_accepted(watched: Watched) -> None:
    """JSON or a stream of events; no other query parameter."""
    client = watched.clients["acme read"]
    assert client.get(PATH, headers={"Accept": "text/plain"}).status_code == 406
    assert client.get(PATH, headers={"Accept": "text/event-stream;q=0"}).status_code == 406
    assert client.get(PATH, params={"after": "x"}).status_code == 422
    assert client.get(PATH, params={"since": "x"}).status_code == 422
    assert watched.server.client("").get(PATH).status_code == 401


def test_the_end_of_the_service_ends_streams(watched: Watched) -> None:
    """The last test here: SIGTERM does not wait for who waits."""
    client = watched.clients["acme read"]
    since = watched.now("acme read")
    with ThreadPoolExecutor(1) as pool, streaming(client) as lines:
        event(lines)
        waiting = pool.submit(watched.page, "acme read", since)
        watched.server.process.send_signal(signal.SIGTERM)
        assert [line for line in lines if line.startswith("data: ")] == []
        with suppress(httpx.TransportError):  # the service may end before this request is there
            assert waiting.result(30)["items"] == []
    assert watched.server.process.wait(20) == 0  # requests under way would have 30 seconds
