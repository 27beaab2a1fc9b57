"""Replicas, in processes of their own, that share a catalog on PostgreSQL and a blob folder."""

import os
import secrets
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from prefix_service.blobs.folder import FolderBlobStore
from prefix_service.catalog.database import Database
from prefix_service.catalog.retention import Retention
from prefix_service.data_folder import collector
from prefix_service.data_folder.collector import collecting
from tests.api.helpers import accepted, problem, tensors_of, upload, weights
from tests.catalog.conftest import template
from tests.commands import run_command
from tests.conftest import Server, running_server
from tests.forked import Forked
from tests.postgresql import PostgreSQL
from tests.processes import eventually, lines_of

__all__ = ["template"]

PASSWORD = "hunter2"  # noqa: S105 - it must not be found
ADAPTER = "/v1/tenants/acme/adapters"


@dataclass
class Fleet:
    """Two replicas, and a client of each with the platform admin's key."""

    servers: list[Server]
    clients: list[httpx.Client]
    postgresql: PostgreSQL
    database: str
    environment: dict[str, str]


def environment_of(postgresql: PostgreSQL, database: str, secret: Path) -> dict[str, str]:
    url = postgresql.url(database).replace("postgres@", f"postgres:{PASSWORD}@")
    return {"PREFIX_CATALOG_URL": url, "PREFIX_KEY_SECRET_FILE": str(secret)}


def data_dir(folder: Path, name: str) -> Path:
    """Makes the data folder of a replica, with the blob folder that all of them share."""
    (folder / "blobs").mkdir(exist_ok=True)
    made = folder / name
    made.mkdir()
    (made / "blobs").symlink_to(folder / "blobs")
    return made


@pytest.fixture(scope="module")
def fleet(postgresql: PostgreSQL, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Two replicas that started together on an empty database."""
    folder, database = tmp_path_factory.mktemp("fleet"), postgresql.new_database()
    secret = folder / "shared.secret"
    secret.write_text(secrets.token_hex(32))
    environment = environment_of(postgresql, database, secret)
    with ExitStack() as stack, ThreadPoolExecutor(2) as pool:

        def start(number: int) -> Server:
            more = {**environment, "PREFIX_ADVERTISE": f"http://replica-{number}:8080/"}
            return stack.enter_context(running_server(data_dir(folder, f"replica-{number}"), environment=more))

        servers = list(pool.map(start, range(2)))
        (key,) = [server.admin_key for server in servers if server.admin_key]
        servers = [replace(server, admin_key=key) for server in servers]
        yield Fleet(servers, [server.client() for server in servers], postgresql, database, environment)
        for server in servers:
            for client in server._clients:
                client.close()
    postgresql.drop(database)


def published(fleet: Fleet, name: str) -> str:
    """Publishes two versions of an adapter through the first replica, and returns the revision after that."""
    for seed in range(2):
        assert upload(fleet.clients[0], "acme", name, file=weights(seed)).status_code == 201
    aliased = fleet.clients[0].put(f"{ADAPTER}/{name}/aliases/prod", json={"version": 1})
    assert aliased.status_code == 201
    return str(aliased.headers["prefix-revision"])


def version_at(client: httpx.Client, reference: str, **headers: str) -> str:
    answer = client.get(f"{ADAPTER}/{reference}/prefix", headers=headers)
    tensors_of(answer)
    return answer.headers["prefix-version"]


def test_one_of_two_that_start_together_makes_the_first_key(fleet: Fleet) -> None:
    """It is valid at both, which have one catalog; neither has another key."""
    keys = [client.get("/v1/keys").json()["items"] for client in fleet.clients]
    assert [key["name"] for key in keys[0]] == ["bootstrap"]
    assert keys[0][0]["id"] == keys[1][0]["id"]
    assert len({client.get("/livez").headers["prefix-catalog"] for client in fleet.clients}) == 1


def test_what_one_writes_the_other_reads(fleet: Fleet) -> None:
    """The same bytes of what was published; with the revision of a write immediately, without it after a moment."""
    published(fleet, "shared")
    first, second = fleet.clients
    moved = first.put(f"{ADAPTER}/shared/aliases/prod", json={"version": 2})
    revision = moved.headers["prefix-revision"]
    assert version_at(second, "shared@prod", **{"Prefix-Min-Revision": revision}) == "2"
    bodies = [client.get(f"{ADAPTER}/shared@prod/prefix").content for client in fleet.clients]
    assert bodies[0] == bodies[1]
    first.put(f"{ADAPTER}/shared/aliases/prod", json={"version": 1})
    eventually(lambda: version_at(second, "shared@prod") == "1")


def make_key(client: httpx.Client) -> tuple[str, str]:
    made = client.post("/v1/tenants/acme/keys", json={"scope": "read", "name": "worker"}).json()
    return made["id"], made["key"]


def test_a_revoked_key_ends_everywhere(fleet: Fleet) -> None:
    """The other replica forgets a key that it has just checked."""
    first, second = fleet.clients
    published(fleet, "revoked")
    key_id, key = make_key(first)
    worker = fleet.servers[1].client(key)
    path = f"{ADAPTER}/revoked@prod/prefix"  # which needs no look into the catalog
    assert [worker.get(path).status_code for _ in range(2)] == [200, 200]
    assert first.delete(f"/v1/tenants/acme/keys/{key_id}").status_code == 204
    eventually(lambda: worker.get(path).status_code == 401)
    assert second.get("/v1/whoami").status_code == 200


def test_who_serves(fleet: Fleet) -> None:
    """A platform admin sees both, and nobody else sees any."""
    first, second = fleet.clients
    published(fleet, "resident")
    version_at(second, "resident")
    eventually(lambda: len(first.get("/v1/replicas").json()["items"]) == 2)
    listed = first.get("/v1/replicas").json()["items"]
    assert sorted(item["address"] for item in listed) == ["http://replica-0:8080", "http://replica-1:8080"]
    assert all(item["started"] <= item["seen"] for item in listed)
    numbered = {client.get("/v1/live").json()["replica"] for client in fleet.clients}
    assert numbered == {item["id"] for item in listed}

    def caught_up() -> bool:
        items = first.get("/v1/replicas").json()["items"]
        return all(item["behind"] == 0 for item in items) and any(item["resident"]["adapters"] for item in items)

    eventually(caught_up)
    revision = listed[0]["revision"]
    assert second.get("/v1/whoami", headers={"Prefix-Min-Revision": revision}).status_code == 200
    _, key = make_key(first)
    problem(fleet.servers[0].client(key).get("/v1/replicas"), 403, "forbidden")


def test_a_rate_is_divided_among_replicas(fleet: Fleet) -> None:
    """And whole again for the one that is left."""
    first = fleet.clients[0]
    published(fleet, "rated")
    first.put("/v1/tenants/acme", json={"requests_per_second": 1001})

    def policies() -> list[str]:
        answers = [client.get(f"{ADAPTER}/rated/aliases/prod") for client in fleet.clients]
        return [answer.headers.get("ratelimit-policy", "") for answer in answers]

    eventually(lambda: policies() == ['"tenant";q=501;w=1'] * 2)
    first.put("/v1/tenants/acme", json={"requests_per_second": None})


def away(server: PostgreSQL) -> Callable[[], Any]:
    return server.away


def stopped(server: PostgreSQL) -> Callable[[], Any]:
    return server.stopped


@pytest.mark.parametrize("how", [away, stopped])
def test_without_postgresql(fleet: Fleet, how: Callable[[PostgreSQL], Callable[[], Any]]) -> None:
    """Whatever was in memory is served, with known keys, and the replica says that it is ready; whatever needs the
    catalog gets 503 with Retry-After. Everything works again once the server is back, and nothing was lost."""
    name = how.__name__
    revision = published(fleet, name)
    for client in fleet.clients:
        # Otherwise a replica could hear late of what was published, and forget what it has read.
        version_at(client, f"{name}@prod", **{"Prefix-Min-Revision": revision})
    with how(fleet.postgresql)():
        for client in fleet.clients:
            assert version_at(client, f"{name}@prod") == "1"
            refused = [
                client.get(f"{ADAPTER}/{name}-unknown/prefix"),
                client.put(f"{ADAPTER}/{name}/aliases/prod", json={"version": 2}),
                client.get("/v1/tenants"),
            ]
            for answer in refused:
                problem(answer, 503, "storage-failed")
                assert int(answer.headers["retry-after"]) >= 1
                assert PASSWORD not in answer.text
            assert client.get("/readyz").status_code == 200
    move = f"{ADAPTER}/{name}/aliases/prod"
    eventually(lambda: fleet.clients[1].put(move, json={"version": 2}).status_code == 200)
    eventually(lambda: version_at(fleet.clients[0], f"{name}@prod") == "2")
    for server in fleet.servers:
        eventually(lambda server=server: server.client().get("/readyz").status_code == 200)  # type: ignore[misc]
        assert [line for line in lines_of(server.log, "request") if line["status"] == 500] == []


def test_without_notifications(fleet: Fleet) -> None:
    """Every change arrives all the same, also those that were made while connections were cut."""
    published(fleet, "quiet")
    first, second = fleet.clients
    version_at(second, "quiet@prod")
    fleet.postgresql.cut_notifications_off(fleet.database)
    fleet.postgresql.end_sessions(fleet.database)
    key_id, key = make_key(first)
    worker = fleet.servers[1].client(key)
    path = f"{ADAPTER}/quiet@prod/prefix"
    eventually(lambda: worker.get(path).status_code == 200)
    assert accepted(lambda: first.put(f"{ADAPTER}/quiet/aliases/prod", json={"version": 2})).status_code == 200
    assert accepted(lambda: first.delete(f"/v1/tenants/acme/keys/{key_id}")).status_code == 204
    eventually(lambda: version_at(second, "quiet@prod") == "2")
    eventually(lambda: worker.get(path).status_code == 401)


def test_the_command_line_works_on_the_catalog(fleet: Fleet, tmp_path: Path) -> None:
    """It makes a key that every replica takes, says what to do for a backup, and looks at the server."""
    options = ("--tenant", "acme", "--scope", "read", "--data-dir", tmp_path)
    made = run_command("key", "create", *options, environment=fleet.environment)
    assert made.returncode == 0, made.stderr
    worker = fleet.servers[1].client(made.stdout.strip())
    eventually(lambda: worker.get("/v1/whoami").status_code == 200)
    refused = run_command("backup", tmp_path / "copy", environment=fleet.environment)
    assert refused.returncode == 1
    assert "pg_dump" in refused.stderr
    found = run_command("doctor", "--url", fleet.servers[0].url, environment=fleet.environment)
    assert "PostgreSQL answers, with schema" in found.stdout
    assert PASSWORD not in made.stderr + refused.stderr + found.stdout + found.stderr


def refusal(folder: Path, environment: dict[str, str]) -> str:
    """What `serve` says that does not start."""
    log = folder.parent / f"{folder.name}.log"
    process = Forked(["serve", "--port", "0", "--data-dir", str(folder)], log, {**os.environ, **environment})
    try:
        assert process.wait(60) == 1
    finally:
        process.kill()
    said = log.read_text()
    assert PASSWORD not in said
    return said


def test_a_replica_that_does_not_belong_is_refused(fleet: Fleet, tmp_path: Path) -> None:
    """With another secret, without one, with other blobs, or where no server is; it says why, without a password."""
    own = fleet.environment
    other = tmp_path / "other.secret"
    other.write_text(secrets.token_hex(32))
    shared = fleet.servers[0].data_dir.parent
    here = data_dir(shared, "stranger")
    assert "hashed with another secret" in refusal(here, {**own, "PREFIX_KEY_SECRET_FILE": str(other)})
    absent = str(tmp_path / "absent")
    assert "openssl rand -hex 32" in refusal(here, {**own, "PREFIX_KEY_SECRET_FILE": absent})
    assert "share one blob store" in refusal(tmp_path / "apart", own)
    assert not (tmp_path / "apart" / "bootstrap.key").exists()
    nowhere = f"postgresql+psycopg://postgres:{PASSWORD}@/db?host={tmp_path}"
    assert "cannot be used: connection" in refusal(here, {**own, "PREFIX_CATALOG_URL": nowhere})
    malformed = f"postgresql://postgres:{PASSWORD}@localhost/db"
    assert "begin it with postgresql+psycopg://" in refusal(here, {**own, "PREFIX_CATALOG_URL": malformed})
    assert "needs PREFIX_KEY_SECRET_FILE" in refusal(here, {"PREFIX_CATALOG_URL": own["PREFIX_CATALOG_URL"]})


def test_a_replica_that_ends_is_gone(fleet: Fleet) -> None:
    """A third one joins, makes no key, and leaves; nobody waits until it is forgotten."""
    first = fleet.clients[0]
    folder = data_dir(fleet.servers[0].data_dir.parent, "third")
    with running_server(folder, environment=fleet.environment):
        assert not (folder / "bootstrap.key").exists()
        eventually(lambda: len(first.get("/v1/replicas").json()["items"]) == 3)
    assert len(first.get("/v1/replicas").json()["items"]) == 2


def test_the_password_is_in_no_log(fleet: Fleet) -> None:
    """After everything that went wrong above."""
    for server in fleet.servers:
        assert "postgresql+psycopg" in server.log.read_text()
        assert PASSWORD not in server.log.read_text()


def test_one_replica_collects(postgresql: PostgreSQL, template: str, tmp_path: Path) -> None:
    """While another one does, garbage is left alone."""
    name = postgresql.new_database(template)
    mine, its = (Database(postgresql.url(name)) for _ in range(2))
    blobs = FolderBlobStore(tmp_path / "blobs")
    staged = blobs.stage()
    staged.write(b"unnamed")
    digest = staged.commit()
    with its.alone(collector._LOCK), collecting(mine, blobs, 0.01, Retention(1, 1, 1)):
        time.sleep(2.5)  # two collections, or none on a slow machine
        assert blobs.exists(digest)
    with collecting(mine, blobs, 0.01, Retention(1, 1, 1)):
        eventually(lambda: not blobs.exists(digest))
    for database in (mine, its):
        database.close()
    postgresql.drop(name)


def test_a_replica_that_only_reads(fleet: Fleet) -> None:
    """It follows the others, refuses changes, and is in no list."""
    published(fleet, "read-only")
    first = fleet.clients[0]
    folder = data_dir(fleet.servers[0].data_dir.parent, "reader")
    with running_server(folder, "--read-only", environment=fleet.environment) as server:
        reader = server.client(fleet.servers[0].admin_key)
        assert version_at(reader, "read-only@prod") == "1"
        first.put(f"{ADAPTER}/read-only/aliases/prod", json={"version": 2})
        eventually(lambda: version_at(reader, "read-only@prod") == "2")
        problem(reader.put(f"{ADAPTER}/read-only/aliases/prod", json={"version": 1}), 403, "read-only")
        assert len(reader.get("/v1/replicas").json()["items"]) <= 2


def test_a_replica_ends_in_order_without_postgresql(fleet: Fleet) -> None:
    """SIGTERM ends it with status 0, soon and without a traceback, although it can neither leave the list of replicas
    nor write which keys were used."""
    folder = data_dir(fleet.servers[0].data_dir.parent, "ends")
    with running_server(folder, environment=fleet.environment) as server:
        assert server.client(fleet.servers[0].admin_key).get("/v1/whoami").status_code == 200
        with fleet.postgresql.away():
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(25) == 0
        assert "Traceback" not in server.log.read_text()
