"""A real service while its disk or its catalog fails: its answers, its log, and its recovery."""

import base64
import hashlib
import json
import os
import resource
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from prefix_service.api.app import create_app
from prefix_service.blobs.folder import FolderBlobStore
from prefix_service.catalog import feed
from prefix_service.data_folder.opening import opened
from prefix_service.prefix.variant import SHARED_FILE_TYPE
from prefix_service.settings import Settings
from tests.api.apps import served
from tests.api.helpers import (
    CONFIG,
    MEDIA_TYPE,
    adapter_of,
    problem,
    tensors_of,
    upload,
    upload_directory,
    versions_path,
    weights,
)
from tests.conftest import Server, running_server
from tests.forked import run_forked
from tests.mounts import fill, read_only, small_disk

pytestmark = pytest.mark.one_process("it harms a data folder; tests/chaos/fleet does as much to a fleet")

PROMPTLY = 10.0  # seconds: the bound of 2, and the time of a busy machine
MLP = "gpt2-n20-proj-trainstate"


def path(adapter: str) -> str:
    return f"/v1/tenants/acme/adapters/{adapter}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "data"


@contextmanager
def serving(folder: Path, *options: str, **environment: str) -> Iterator[tuple[Server, httpx.Client]]:
    """Yields a service with the adapters `warm`, which is resident, and `cold`, which is not."""
    with running_server(folder, *options, environment=environment) as server:
        client = server.client()
        for number, adapter in enumerate(("warm", "cold")):
            assert upload(client, "acme", adapter, file=weights(number)).status_code == 201
        tensors_of(client.get(f"{path('warm')}/prefix"))
        yield server, client


def not_ready(client: httpx.Client) -> str:
    """Returns the reason that both routes of readiness give, as soon as they do."""
    until = time.monotonic() + 60
    while True:
        began = time.monotonic()
        answer = client.get("/readyz")
        assert time.monotonic() - began < PROMPTLY
        if answer.status_code == 503:
            break
        assert time.monotonic() < until, "it still says that it is ready"
        time.sleep(0.1)
    assert int(answer.headers["retry-after"]) == 1
    problem(client.get("/v2/health/ready"), 503, "storage-failed")
    assert client.get("/livez").status_code == 200
    detail: str = problem(answer, 503, "storage-failed")["detail"]
    return detail


def is_collected(folder: Path) -> bool:
    """Returns whether the collector has nothing left to forget."""
    with closing(sqlite3.connect(folder / "catalog.sqlite")) as catalog:
        return not catalog.execute("SELECT digest FROM garbage").fetchone()


def ready_again(client: httpx.Client) -> None:
    eventually(lambda: client.get("/readyz").status_code == 200)


def eventually(holds: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < until, "it has not recovered"
        time.sleep(0.1)


def refused(client: httpx.Client, code: str, adapter: str = "cold") -> str:
    """Checks that a read which needs the failed part gets 503 in time, with Retry-After."""
    began = time.monotonic()
    answer = client.get(f"{path(adapter)}/prefix")
    assert time.monotonic() - began < PROMPTLY
    assert int(answer.headers["retry-after"]) == 1
    detail: str = problem(answer, 503, code)["detail"]
    return detail


def events(server: Server, name: str) -> list[dict[str, Any]]:
    """Returns the lines of the log that begin with this text."""
    whole = server.log.read_text().rpartition("\n")[0]  # another line may be half written
    return [line for line in map(json.loads, whole.splitlines()) if line["event"].startswith(name)]


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Locks the catalog, as another program does."""
    holding = "import sqlite3, sys; sqlite3.connect(sys.argv[1], isolation_level=None).execute('BEGIN EXCLUSIVE')"
    command = [sys.executable, "-c", f"{holding}; print(flush=True); input()", str(folder / "catalog.sqlite")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        yield
        other.communicate(b"\n")


def test_a_locked_catalog(folder: Path) -> None:
    """While the catalog is locked, resident adapters are served and all else is refused in time, also for many callers;
    afterwards everything works."""
    with serving(folder) as (server, client):
        names = ("not ready", "ready again")
        before = [len(events(server, name)) for name in names]  # a slow machine may have been late at the start
        with locked(folder):
            assert "locked" in refused(client, "storage-failed")
            assert client.get(f"{path('warm')}/prefix").status_code == 200
            began = time.monotonic()
            asked = [client.put(f"{path('warm')}/aliases/a{number}", json={"version": 1}) for number in range(20)]
            assert {answer.status_code for answer in asked} == {503}
            assert time.monotonic() - began < 4 * PROMPTLY
            assert "locked" in not_ready(client)
        ready_again(client)
        tensors_of(client.get(f"{path('cold')}/prefix"))
        eventually(lambda: [len(events(server, name)) for name in names] == [count + 1 for count in before])


def test_an_alias_holds_while_the_catalog_is_away(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the catalog is away an alias holds for the stated time, here one second, and is then refused; afterwards it
    is current."""
    monkeypatch.setattr(feed, "_STALE", 2.0)
    settings = Settings(data_dir=folder, dev=True)
    with opened(settings), served(create_app(settings)) as url, httpx.Client(base_url=url, timeout=30) as client:
        for number in range(2):
            assert upload(client, "acme", "a", file=weights(number)).status_code == 201
        alias = f"{path('a')}/aliases/prod"
        for version in (1, 2):
            assert client.put(alias, json={"version": version}).status_code in (200, 201)
        asked = f"{path('a@prod')}/prefix"
        assert client.get(asked).headers["prefix-version"] == "2"
        began = time.monotonic()  # before the lock: after it, some of the stated time may be over
        with locked(folder):
            while (answer := client.get(asked)).status_code == 200:
                assert answer.headers["prefix-version"] == "2"
                assert time.monotonic() - began < 60
            problem(answer, 503, "storage-failed")
            assert time.monotonic() - began > 1.5
        eventually(lambda: client.get(asked).status_code == 200)


def test_a_blob_folder_that_is_gone(folder: Path) -> None:
    """A missing blob folder is `unavailable`, not damage: nothing is encoded again, and the log names no lost blob."""
    with serving(folder) as (server, client):
        (folder / "blobs").rename(folder / "away")
        assert "the blob folder blobs is gone" in not_ready(client)
        assert "the blob folder blobs is gone" in refused(client, "unavailable")
        problem(client.get(f"{path('cold')}/parameters"), 503, "unavailable")
        assert client.get(f"{path('warm')}/prefix").status_code == 200
        unpublished = problem(upload(client, "acme", "new", file=weights(7)), 503, "unavailable")
        assert "the blob folder blobs is gone" in unpublished["detail"]
        (folder / "away").rename(folder / "blobs")
        ready_again(client)
        tensors_of(client.get(f"{path('cold')}/prefix"))
        assert events(server, "keys and values lost") == events(server, "blobs lost") == []


def test_a_data_folder_that_is_gone(folder: Path) -> None:
    """A missing data folder makes the service not ready, although the open file of the catalog still answers."""
    with serving(folder) as (server, client):
        folder.rename(folder.with_name("away"))
        assert not_ready(client)
        assert client.get(f"{path('warm')}/prefix").status_code == 200
        folder.with_name("away").rename(folder)
        ready_again(client)
        assert server.process.poll() is None


def test_no_file_descriptors(folder: Path) -> None:
    """Without file descriptors the service reports it, serves what is resident, and recovers."""
    with serving(folder) as (server, client):
        pid = server.process.pid
        before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (_lowest_free(pid), before[1]))
        assert "Too many open files" in not_ready(client)
        assert "Too many open files" in refused(client, "unavailable")
        assert client.get(f"{path('warm')}/prefix").status_code == 200
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
        ready_again(client)
        tensors_of(client.get(f"{path('cold')}/prefix"))


def _lowest_free(pid: int) -> int:
    taken = {int(name) for name in os.listdir(f"/proc/{pid}/fd")}  # noqa: PTH208
    return next(number for number in range(len(taken) + 1) if number not in taken)


def test_a_full_disk(folder: Path) -> None:
    """On a full disk reads go on, publications are refused, and deletions and the following collection free space."""
    with small_disk(folder, 64 << 20), serving(folder, PREFIX_GARBAGE_GRACE="1") as (server, client):
        key = client.post("/v1/tenants/acme/keys", json={"scope": "read"}).json()["id"]
        client.put(f"{path('warm')}/aliases/prod", json={"version": 1})
        large = {**CONFIG, "num_virtual_tokens": 2000, "num_layers": 32}
        made = client.post(versions_path("acme", "large"), json={"config": large})
        assert made.status_code == 201, made.text
        blobs = [folder / "blobs" / digest[7:9] / digest[7:] for digest in (made.json()["weights"],)]
        eventually(lambda: is_collected(folder))  # what fills the disk meanwhile may take the reserve that is lent
        filler = fill(folder)
        assert "No space left" in not_ready(client)
        problem(upload(client, "acme", "new", file=weights(7)), 507, "out-of-space")
        for adapter in ("warm", "cold"):
            tensors_of(client.get(f"{path(adapter)}/prefix"))
        gone = (f"{path('warm')}/aliases/prod", path("warm@1"), path("large"), f"/v1/tenants/acme/keys/{key}")
        for resource_ in (*gone, "/v1/tenants/acme"):
            answer = client.delete(resource_)
            assert answer.status_code == 204, f"{resource_}: {answer.text}"
        eventually(lambda: not any(blob.exists() for blob in blobs))
        filler.unlink()
        ready_again(client)
        assert upload(client, "acme", "new", file=weights(7)).status_code == 201
        assert server.process.poll() is None


def test_a_disk_that_becomes_read_only(folder: Path) -> None:
    """On a disk that became read-only all stored adapters are served, and changes fail and leave nothing."""
    with serving(folder) as (_, client):
        with read_only(folder):
            assert "Read-only file system" in not_ready(client)
            for adapter in ("warm", "cold"):
                tensors_of(client.get(f"{path(adapter)}/prefix"))
            problem(upload(client, "acme", "new", file=weights(7)), 503, "storage-failed")
            problem(client.delete(path("cold")), 503, "storage-failed")
        ready_again(client)
        assert client.get(path("cold")).status_code == 200


def test_a_read_only_service(folder: Path) -> None:
    """A read-only service on a read-only mount, next to one that writes, serves everything, follows changes, and
    refuses each changing route with one code."""
    with serving(folder) as (writer, writing):
        before = {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}
        view = folder.with_name("view")
        view.symlink_to(folder)
        with running_server_read_only(view, writer) as (server, client):
            assert client.get("/readyz").status_code == 200
            expected = writing.get(f"{path('cold')}/prefix")
            found = client.get(f"{path('cold')}/prefix")
            assert (found.content, found.headers["etag"]) == (expected.content, expected.headers["etag"])
            for method, route in changing_routes():
                answer = client.request(method, route, json={"version": 1})
                assert problem(answer, 403, "read-only")["detail"].startswith("this service is read-only"), route
            now = {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}
            changed = {file.name for file in now if now[file] != before.get(file)}
            assert changed <= {"serve.log", "catalog.sqlite", "catalog.sqlite-journal"}  # its writer notes uses of keys
            assert client.get(f"{path('warm@prod')}/prefix").status_code == 404
            assert writing.put(f"{path('warm')}/aliases/prod", json={"version": 1}).status_code == 201
            eventually(lambda: client.get(f"{path('warm@prod')}/prefix").status_code == 200)
            assert events(server, "garbage") == []
        assert "Traceback" not in server.log.read_text(), "the end writes down when keys were used"


@contextmanager
def running_server_read_only(folder: Path, writer: Server) -> Iterator[tuple[Server, httpx.Client]]:
    """Yields a second service, which needs a folder of its own for its log alone."""
    log = folder.with_name("log")
    environment = {"PREFIX_DATA_DIR": str(folder)}
    with running_server(log, "--data-dir", str(folder), "--read-only", environment=environment) as server:
        yield server, server.client(writer.admin_key)


def changing_routes() -> list[tuple[str, str]]:
    """Returns all routes whose method can change something, without those that only read."""
    document = create_app(Settings()).openapi()
    reading = ("/prefix", "/v1/prefixes", "/infer", "/repository/index")
    names = {"tenant": "acme", "name": "warm", "ref": "warm", "alias": "prod", "key_id": "0" * 16}
    return [
        (method.upper(), route.format(**names))
        for route, methods in document["paths"].items()
        for method in methods
        if method in ("post", "put", "patch", "delete") and not route.endswith(reading)
    ]


def test_a_read_only_mount(folder: Path) -> None:
    """A folder on a read-only mount is served with --read-only; without it the start fails and says how; a folder
    without a catalog is refused."""
    with serving(folder) as (writer, _):
        key = writer.admin_key
    with read_only(folder):
        refused = start(folder)
        assert "Read-only file system: start with --read-only to serve what it holds" in refused
        with running_server(folder.with_name("log"), "--data-dir", str(folder), "--read-only") as server:
            client = server.client(key)
            assert client.get("/readyz").status_code == 200
            for adapter in ("warm", "cold"):
                tensors_of(client.get(f"{path(adapter)}/prefix"))
    folder.with_name("empty").mkdir()
    assert "catalog.sqlite is missing" in start(folder.with_name("empty"), "--read-only")
    assert list(folder.with_name("empty").iterdir()) == []


def start(folder: Path, *options: str) -> str:
    """Returns the output of a start that fails."""
    ended = run_forked("serve", "--port", "0", "--data-dir", folder, *options)
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    return " ".join(ended.stderr.split())


def other_bits(folder: Path, adapter: str) -> tuple[Path, Path]:
    """Stores other last bits for a version, as another processor would encode it; returns the file with this machine's
    bits and the file with the others."""
    with closing(sqlite3.connect(folder / "catalog.sqlite", timeout=10)) as catalog, catalog:
        query = "SELECT versions.id, key_values FROM versions JOIN adapters ON adapters.id = adapter_id WHERE name = ?"
        ((version, digest),) = catalog.execute(query, [adapter]).fetchall()
        store = FolderBlobStore(folder / "blobs")
        data = bytearray(store.read(digest))
        data[-4] ^= 1
        staged = store.stage()
        staged.write(data)
        other = staged.commit()
        catalog.execute("UPDATE versions SET key_values = ? WHERE id = ?", [other, version])
    return store.path(digest), store.path(other)


@pytest.mark.parametrize("harm", ["lost", "damaged"])
def test_lost_bits_are_replaced_within_the_request(folder: Path, harm: str) -> None:
    """If a version was encoded again, the answer has the new bits, entity tag and digest in every process, and the old
    tag is not current."""
    with running_server(folder, "--workers", "2") as server:
        client = server.client()
        upload_directory(client, "acme", "mlp", adapter_of(MLP))
        upload_directory(client, "acme", "twin", adapter_of(MLP))
        own, file = other_bits(folder, "mlp")
        own.unlink()
        asked = f"{path('mlp')}/prefix?batch_size=2"
        etag = client.head(asked).headers["etag"]  # which touches no tensor
        if harm == "lost":
            file.unlink()
        else:
            file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
        fields = {"If-Range": etag, "Range": "bytes=0-9", "Want-Repr-Digest": "sha-256=1"}
        with ThreadPoolExecutor(6) as pool:
            answers = list(pool.map(lambda one: one.get(asked, headers=fields), [server.client() for _ in range(6)]))
        (current,) = {answer.headers["etag"] for answer in answers}
        assert current != etag
        body = {answer.content for answer in answers}
        assert {answer.headers["repr-digest"] for answer in answers} == {_repr_digest(*body)}
        found, expected = tensors_of(answers[0]), tensors_of(client.get(f"{path('twin')}/prefix?batch_size=2"))
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert own.exists()
        eventually(lambda: client.get(asked, headers={"If-None-Match": etag}).status_code == 200)
        assert client.get(asked, headers={"If-None-Match": current}).status_code == 304


def _repr_digest(body: bytes) -> str:
    return f"sha-256=:{base64.b64encode(hashlib.sha256(body).digest()).decode()}:"


def test_lost_bits_are_replaced_whatever_is_asked(folder: Path) -> None:
    """Every route answers in the same request in which lost bits are replaced; a shared file gets its new tag too."""
    shared, uds = folder.with_name("shared"), folder.with_name("socket")
    environment = {"PREFIX_SHARED_DIR": str(shared), "PREFIX_UDS": str(uds)}
    with running_server(folder, environment=environment, uds=uds) as server:
        client = server.client()
        binary = {"inputs": [], "parameters": {"binary_data_output": True}}
        calls: list[tuple[str, str, dict[str, Any]]] = [
            ("POST", "/v1/prefixes", {"rows": ["acme/a0", None, ["acme/a0", "acme/a0"]]}),
            ("POST", "/v2/models/acme/a1/infer", binary),
            ("PUT", f"{path('a2')}/residency", {"pinned": True}),
            ("POST", versions_path("acme", "both"), {"compose": ["acme/a3", "acme/a3"]}),
        ]
        for number in range(len(calls) + 1):
            upload_directory(client, "acme", f"a{number}", adapter_of(MLP))
        files = {file for number in range(len(calls) + 1) for file in other_bits(folder, f"a{number}")}
        assert len(files) == 2  # all have the same bits
        for file in files:
            file.unlink()
        for method, url, body in calls:
            answer = client.request(method, url, json=body)
            assert answer.status_code in (200, 201), answer.text
        asked = f"{path('a4')}/prefix"
        etag = client.head(f"{asked}?batch_size=2").headers["etag"]
        first, again = (client.get(asked, headers={"Accept": f"{SHARED_FILE_TYPE}, {MEDIA_TYPE}"}) for _ in range(2))
        assert (first.status_code, first.headers["etag"]) == (200, again.headers["etag"])
        assert client.head(f"{asked}?batch_size=2").headers["etag"] != etag
        assert len(events(server, "keys and values lost")) == len(calls) + 1
