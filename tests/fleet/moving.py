"""`python -m tests.fleet.moving --adapters 10000` moves a data folder in use to PostgreSQL and S3, and back.

Publishers go on meanwhile; two runs of `migrate` are killed, one among the blobs, one among the rows. In the end the
folder is served read-only, and every row, every blob and a sample of answers are compared.
"""

import hashlib
import itertools
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final

import httpx
import obstore
import sqlalchemy as sa
import typer

from prefix_service.blobs.names import path_of
from prefix_service.catalog.database import Database
from prefix_service.catalog.schema import adapters, catalog, metadata, replicas, tenants, versions
from prefix_service.cli.commands.migrate import target_of
from prefix_service.data_folder.moving import move
from prefix_service.data_folder.opening import blob_folder, catalog_file
from prefix_service.settings import Settings
from tests.api.helpers import accepted, upload, weights
from tests.benchmarks.growth.folder import BIG, fill, name_of
from tests.blobs.places import objects
from tests.commands import run_command
from tests.conftest import Server, free_port, running_server
from tests.postgresql import PostgreSQL, binaries
from tests.seaweedfs import SeaweedFS

_PUBLISHERS: Final = 3
Say = Callable[[str], object]


@dataclass
class Ground:
    """Where a service moves from and to."""

    folder: Path
    postgresql: PostgreSQL
    seaweedfs: SeaweedFS
    bucket_path: str = "moved"
    database: str = field(init=False)

    def __post_init__(self) -> None:
        self.database = self.postgresql.new_database()
        obstore.put(objects(self.seaweedfs.url), "made", b"the bucket")

    @property
    def data_dir(self) -> Path:
        """The folder that is moved."""
        return self.folder / "data"

    @property
    def catalog_url(self) -> str:
        """The database that is filled."""
        return self.postgresql.url(self.database)

    @property
    def blobs_url(self) -> str:
        """The place in the bucket that is filled."""
        return f"s3://tests/{self.bucket_path}"

    @property
    def fleet(self) -> dict[str, str]:
        """The settings of a replica on what was filled."""
        secret = str(self.data_dir / "key.secret")
        urls = {"PREFIX_CATALOG_URL": self.catalog_url, "PREFIX_BLOBS_URL": self.blobs_url}
        return self.seaweedfs.environment | urls | {"PREFIX_KEY_SECRET_FILE": secret}

    @property
    def options(self) -> list[str | Path]:
        """The options of a `migrate` to the fleet."""
        return ["--data-dir", self.data_dir, "--to-catalog", self.catalog_url, "--to-blobs", self.blobs_url]


def campaign(ground: Ground, count: int, say: Say) -> list[str]:
    """Moves a folder with so many adapters; returns what differs in the end, a line each."""
    fill_folder(ground.data_dir, count)
    say(f"filled {count} adapters")
    with running_server(ground.data_dir, environment={"PREFIX_LOG_LEVEL": "warning"}) as server:
        with traffic(server) as changes:
            for what in ("blobs", "rows"):
                killed(ground, what)
                say(f"killed among the {what}; {len(changes)} changes so far")
                assert_nobody_serves(ground)
            say(f"complete: {migrated(ground)}; {len(changes)} changes so far")
            say(f"again: {migrated(ground)}; {len(changes)} changes so far")
        key = server.admin_key
    with running_server(ground.data_dir, "--read-only") as server:
        say(f"the last one, read-only: {migrated(ground)}")
        rows = different_rows(catalog_file(ground.data_dir), ground.catalog_url)
        blobs = different_blobs(ground)
        with running_server(ground.folder / "replica", environment=ground.fleet) as replica:
            answers = different_answers(server.client(key), replica.client(key))
    back = ground.folder / "back"
    done = run_command("migrate", "--to-data-dir", back, "--json", environment=ground.fleet)
    assert done.returncode == 0, done.stderr
    say(f"back: {summary(json.loads(done.stdout))}")
    found = {
        "rows": rows,
        "blobs": blobs,
        "answers": answers,
        "rows, back": different_rows(ground.catalog_url, catalog_file(back)),
        "blobs, back": damaged_files(back),
    }
    say(", ".join(f"{name}: {len(lines)} differences" for name, lines in found.items()))
    return [f"{name}: {line}" for name, lines in found.items() for line in lines]


def fill_folder(data_dir: Path, count: int) -> None:
    """Makes a data folder with so many adapters."""
    with running_server(data_dir) as server:
        upload(server.client(), BIG, "first").raise_for_status()
    fill(data_dir, count)


@contextmanager
def traffic(server: Server) -> Iterator[list[str]]:
    """Publishes, moves aliases, deletes, and makes and revokes keys while the block runs; yields what was done."""
    done: list[str] = []
    stop = threading.Event()

    def work(number: int) -> None:
        client = server.client()
        for seed in itertools.count(1):
            if stop.wait(0.02):
                return
            _change(client, number, seed)
            done.append(f"{number}/{seed}")

    with ThreadPoolExecutor(_PUBLISHERS) as pool:
        working = [pool.submit(work, number) for number in range(_PUBLISHERS)]
        try:
            yield done
        finally:
            stop.set()
    for one in working:
        one.result()


def _change(client: httpx.Client, number: int, seed: int) -> None:
    tenant, name = f"moving-{number}", f"a{seed % 7}"
    own = f"/v1/tenants/{tenant}"

    def done(send: Callable[[], httpx.Response]) -> httpx.Response:
        return accepted(send).raise_for_status()

    version = done(lambda: upload(client, tenant, name, file=weights(seed))).json()["version"]
    done(lambda: client.put(f"{own}/adapters/{name}/aliases/prod", json={"version": version}))
    if seed % 5 == 0:
        done(lambda: client.delete(f"{own}/adapters/{name}"))
        client.delete(f"/v1/tenants/{BIG}/adapters/{name_of(seed * _PUBLISHERS + number)}")
    if seed % 3 == 0:
        key = done(lambda: client.post(f"{own}/keys", json={"scope": "read"})).json()["id"]
        if seed % 2 == 0:
            done(lambda: client.delete(f"{own}/keys/{key}"))


def killed(ground: Ground, what: str) -> None:
    """Kills a run with SIGKILL when it has copied a third of its blobs, or of its rows."""
    own = (ground.data_dir, ground.catalog_url, ground.blobs_url)
    context = multiprocessing.get_context("forkserver")  # a process that has imported everything already
    process = context.Process(target=_move_and_die, args=(ground.seaweedfs.environment, what, *own))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def _move_and_die(environment: Mapping[str, str], what: str, data_dir: Path, to_catalog: str, to_blobs: str) -> None:
    os.environ.update(environment)

    def progress(now: str, at: int, total: int) -> None:
        if now == what and at >= total / 3:
            os.kill(os.getpid(), signal.SIGKILL)

    source = Settings(data_dir=data_dir)
    move(source, target_of(source, to_catalog, to_blobs, None), progress)


def assert_nobody_serves(ground: Ground) -> None:
    """Checks that no replica starts on what an unfinished run left."""
    refused = run_command("key", "list", "--data-dir", ground.folder / "replica", environment=ground.fleet)
    assert refused.returncode == 1, refused.stdout
    assert "has not come to its end" in refused.stderr


def migrated(ground: Ground) -> str:
    """Runs `migrate` to its end; returns what it did."""
    done = run_command("migrate", *ground.options, "--json", environment=ground.seaweedfs.environment)
    assert done.returncode == 0, done.stderr
    return summary(json.loads(done.stdout))


def summary(done: dict[str, Any]) -> str:
    """Returns the result of a run in a few words."""
    rows = ", ".join(f"{count} {name}" for name, count in done["rows"].items())
    return f"{done['blobs']} blobs, rows: {rows}"


def different_answers(mine: httpx.Client, its: httpx.Client) -> list[str]:
    """Compares answers of two services, bytes and headers that matter; returns those that differ."""
    tenants = [f"moving-{number}" for number in range(_PUBLISHERS)]
    paths = ["/v1/tenants?limit=1000", "/v1/keys", f"/v1/tenants/{BIG}/adapters/first/prefix"]
    for tenant in tenants:
        own = f"/v1/tenants/{tenant}"
        paths += [f"{own}/keys", f"{own}/audit?limit=100", f"{own}/adapters?limit=100", f"{own}/usage"]
        paths += [f"{own}/adapters/a{number}@prod/prefix" for number in range(7)]
    differences = []
    for path in paths:
        one, other = mine.get(path), its.get(path)
        heads = [(each.status_code, each.headers.get("ETag"), each.headers["Prefix-Catalog"]) for each in (one, other)]
        if heads[0] != heads[1] or (one.status_code == 200 and _told(one) != _told(other)):
            differences.append(f"{path}: {heads[0]} {one.content[:2000]!r}, {heads[1]} {other.content[:2000]!r}")
    return differences


def _told(answer: httpx.Response) -> object:
    """Returns a body without the moment at which a key was used last: this comparison uses one. The bytes that wait
    for a collection are left out too: a replica removes rows of deleted adapters, a read-only service does not.
    """
    if "json" not in answer.headers["Content-Type"]:
        return answer.content
    own = ("last_used", "uncollected")
    return json.loads(answer.text, object_hook=lambda found: {k: v for k, v in found.items() if k not in own})


def different_rows(mine: Path | str, its: Path | str) -> list[str]:
    """Returns the rows that only one of two catalogs has."""
    one, other = (_rows(place) for place in (mine, its))
    return [
        f"{name}: only {whose} has {row}"
        for name in one
        for whose, rows in (("the first", one[name] - other[name]), ("the second", other[name] - one[name]))
        for row in sorted(rows)
    ]


def _rows(place: Path | str) -> dict[str, set[str]]:
    def plain(column: str, value: Any) -> Any:
        # A key that was used for the comparison; SQLite does not keep fractions of seconds everywhere.
        return None if column == "last_used" else value.replace(microsecond=0) if hasattr(value, "hour") else value

    with closing(Database(place, read_only=True)) as database, database.reading() as connection:
        found = {}
        for table in metadata.sorted_tables:
            if table is not replicas:
                wanted = [table.c.id, table.c.revision] if table is catalog else list(table.c)
                rows = connection.execute(sa.select(*wanted)).mappings()
                found[table.name] = {repr([plain(name, value) for name, value in row.items()]) for row in rows}
        return found


def named(place: Path | str) -> set[str]:
    """Returns the digests of all blobs that a catalog names. Versions of a deleted adapter name none: their rows are
    removed a moment later.
    """
    query = sa.select(versions.c.weights, versions.c.key_values).select_from(versions.join(adapters).join(tenants))
    query = query.where(sa.not_(adapters.c.deleted), sa.not_(tenants.c.deleted))
    with closing(Database(place, read_only=True)) as database, database.reading() as connection:
        return {digest for row in connection.execute(query) for digest in row}


def different_blobs(ground: Ground) -> list[str]:
    """Returns the blobs that the database names and that are missing in the bucket, or are others."""
    store = objects(ground.seaweedfs.url, ground.bucket_path)
    there = {item["path"] for page in obstore.list(store) for item in page}
    wanted = named(ground.catalog_url)
    missing = {digest for digest in wanted if path_of(digest) not in there}
    read = (
        (digest, hashlib.sha256(obstore.get(store, path_of(digest)).bytes()).hexdigest()) for digest in wanted - missing
    )
    damaged = (digest for digest, found in read if digest != f"sha256:{found}")
    return [f"{digest} is missing" for digest in sorted(missing)] + [f"{digest} is damaged" for digest in damaged]


def damaged_files(data_dir: Path) -> list[str]:
    """Returns the blobs that a data folder's catalog names and that are missing in it, or are others."""
    paths = {digest: blob_folder(data_dir) / path_of(digest) for digest in named(catalog_file(data_dir))}
    return [
        digest
        for digest, path in paths.items()
        if not path.exists() or digest != f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
    ]


def main(
    count: Annotated[
        int, typer.Option("--adapters", min=1, help="Adapters in the folder, beside those of the traffic.")
    ] = 10_000,
) -> None:
    """Moves a data folder in use to PostgreSQL and S3, killed twice on its way, and back. Exits with status 1 if
    anything differs in the end.
    """
    bin_ = binaries()
    if bin_ is None:
        sys.exit("PostgreSQL is not installed")
    started = time.monotonic()

    def say(line: str) -> None:
        typer.echo(f"{time.monotonic() - started:6.1f} s  {line}")

    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        servers = PostgreSQL(bin_, free_port()), SeaweedFS(free_port)
        for server in servers:
            stack.callback(server.remove)
        differences = campaign(Ground(Path(folder), *servers), count, say)
    for line in differences:
        typer.echo(line)
    sys.exit(1 if differences else 0)


if __name__ == "__main__":
    typer.run(main)
