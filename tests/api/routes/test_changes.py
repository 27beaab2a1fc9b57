"""`GET /v1/changes` shows a key its changes, lets it wait for them, and ends the wait."""

import asyncio
import json
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa

from prefix_service.api.app import create_app
from prefix_service.api.http.opaque import Revisions
from prefix_service.catalog.changes import catalog_id
from prefix_service.catalog.records import Principal
from prefix_service.catalog.schema import changes
from prefix_service.settings import Settings
from tests.api.apps import served
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
        """Returns the present revision, in the text that the owner of a key gets."""
        return str(self.page(whose)["revision"])

    def page(self, whose: str, since: str | None = None) -> dict[str, Any]:
        client = self.admin if whose == "platform" else self.clients[whose]
        answer = client.get(PATH, params={} if since is None else {"since": since})
        assert answer.status_code == 200, answer.text
        page: dict[str, Any] = answer.json()
        return page

    def move(self, tenant: str, alias: str = "prod") -> None:
        """Makes and deletes an alias of a tenant."""
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
    """Changes come oldest first, with the fields of their kind, and the answer's revision continues from there."""
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
    """A key gets its tenant's changes, a platform key all, and only admins those of keys and quotas."""
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
    """Every revision's text differs, even if nothing changed; any other text is refused, and another tenant's."""
    assert len({watched.now("acme read") for _ in range(4)}) == 4
    acme, client = watched.now("acme read"), watched.clients["beta read"]
    for text in (acme, watched.now("platform"), "0" * 32):
        problem(client.get(PATH, params={"since": text}), 422, "invalid-request")
    assert client.get(PATH, headers={**STREAM, "Last-Event-ID": acme}).status_code == 422


def test_the_answer_waits_for_a_change(watched: Watched) -> None:
    """A change of the key's tenant ends the wait, and another tenant's does not."""
    before = watched.now("acme read")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(watched.page, "acme read", before)
        watched.move("beta")
        watched.move("acme")
        page = waiting.result(60)
    assert page["items"]
    assert {item["tenant"] for item in page["items"]} == {"acme"}


def test_what_is_no_longer_kept_is_gone(watched: Watched) -> None:
    """A revision whose changes were deleted is a 410, after which the caller must read everything again."""
    before = watched.now("acme read")
    for _ in range(2):
        watched.move("acme")
    with watched.server.writing() as catalog:
        latest = sa.select(sa.func.max(changes.c.revision)).scalar_subquery()
        catalog.execute(sa.delete(changes).where(changes.c.revision < latest))
    for headers in ({}, STREAM):
        answer = watched.clients["acme read"].get(PATH, params={"since": before}, headers=headers)
        problem(answer, 410, "gone")
    watched.now("acme read")


@contextmanager
def streaming(client: httpx.Client, **headers: str) -> Iterator[Iterator[str]]:
    """Yields the lines of a stream of events."""
    with client.stream("GET", PATH, headers={**STREAM, **headers}) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert "content-length" not in answer.headers
        yield answer.iter_lines()


def event(lines: Iterator[str]) -> tuple[str, dict[str, Any] | None]:
    """Returns the next event's id and data; an event without data has the revision to continue from."""
    found = dict(line.split(": ", 1) for line in iter(lambda: next(lines), ""))
    return found["id"], json.loads(found["data"]) if "data" in found else None


def changed(lines: Iterator[str]) -> dict[str, Any]:
    """Returns the next change in a stream."""
    while True:
        revision, found = event(lines)
        if found is not None:
            assert found["revision"] == revision
            return found


def test_a_stream_of_events(watched: Watched) -> None:
    """Each event has its revision as id, from which another stream continues."""
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
    """When a key ends, so does its stream, and a caller that waits for a page gets 401, as every later request does. A
    look that began before may still find that the tenant was deleted.
    """
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
        answer = waiting.result(60)
    assert seen in ([], ["tenant-deleted"])
    assert answer.status_code == 401 or kinds(answer.json()) == ["tenant-deleted"]
    assert client.get(PATH).status_code == 401


def test_a_write_says_its_revision(watched: Watched) -> None:
    """The changes after a write's revision are later ones. Reads and refused writes have none."""
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
    """A read can name a revision that a key of its tenant got; any other text is refused."""
    revision = watched.now("acme read")
    client = watched.clients["acme read"]
    for path in ("/v1/tenants/acme/adapters/a/prefix", "/v1/tenants/acme/adapters", "/v2/models/acme/a"):
        refused = 400 if path.startswith("/v2") else 422
        for text, status in ((revision, 200), ("0", refused), (watched.now("beta read"), refused)):
            assert client.get(path, headers={"Prefix-Min-Revision": text}).status_code == status


def test_every_answer_names_the_catalog(watched: Watched) -> None:
    """Every answer has the id that the catalog keeps."""
    with watched.server.writing() as catalog:
        expected = catalog_id(catalog)
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


@pytest.mark.one_process("each process bounds its own watchers")
def test_watchers_are_bounded(watched: Watched) -> None:
    """A tenant may be a quarter of the watchers; its other requests and other tenants are not affected."""
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
    """Waits until the service has noticed that watchers have left."""
    for _ in range(3000):
        if client.get(PATH).status_code == 200:
            return
    raise AssertionError("watchers that left still count")


def test_only_what_is_offered_is_accepted(watched: Watched) -> None:
    """The route offers JSON and a stream of events, and accepts no other query parameter."""
    client = watched.clients["acme read"]
    assert client.get(PATH, headers={"Accept": "text/plain"}).status_code == 406
    assert client.get(PATH, headers={"Accept": "text/event-stream;q=0"}).status_code == 406
    assert client.get(PATH, params={"after": "x"}).status_code == 422
    assert client.get(PATH, params={"since": "x"}).status_code == 422
    assert watched.server.client("").get(PATH).status_code == 401


@pytest.mark.one_process("it ends the service's process")
def test_the_end_of_the_service_ends_streams(watched: Watched) -> None:
    """SIGTERM does not wait for streams and waiting callers. This must be the last test."""
    client = watched.clients["acme read"]
    since = watched.now("acme read")
    with ThreadPoolExecutor(1) as pool, streaming(client) as lines:
        event(lines)
        waiting = pool.submit(watched.page, "acme read", since)
        watched.server.process.send_signal(signal.SIGTERM)
        assert [line for line in lines if line.startswith("data: ")] == []
        with suppress(httpx.TransportError):  # the service may end before this request is there
            assert waiting.result(60)["items"] == []
    assert watched.server.process.wait(90) == 0
    assert "timeout graceful shutdown exceeded" not in watched.server.logs()  # as requests under way would


def test_pages_are_written_off_the_event_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of watchers that were away may ask for full pages together, which would stop it for seconds."""
    text, on_loop = Revisions.text, []

    def watched_text(self: Revisions, by: Principal, revision: int) -> str:
        on_loop.append(asyncio._get_running_loop() is not None)
        return text(self, by, revision)

    monkeypatch.setattr(Revisions, "text", watched_text)
    with served(create_app(Settings(data_dir=tmp_path, dev=True))) as url:
        since = {"since": httpx.get(url + PATH, timeout=60).json()["revision"]}
        assert httpx.put(f"{url}/v1/tenants/acme", timeout=60).status_code == 201
        on_loop.clear()
        assert len(httpx.get(url + PATH, params=since, timeout=60).json()["items"]) == 1
        with httpx.stream("GET", url + PATH, params=since, headers=STREAM, timeout=60) as stream:
            assert next(stream.iter_lines()).startswith("id: ")
    assert on_loop == [False] * 4
