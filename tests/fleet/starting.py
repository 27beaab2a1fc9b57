"""Starts a fleet: replicas that share a catalog on PostgreSQL and a bucket of SeaweedFS, behind HAProxy with the file
that `deploy haproxy` writes."""

import contextlib
import re
import secrets
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from string import ascii_lowercase
from typing import Final

import httpx
import obstore

from tests.benchmarks.speed.peers import started
from tests.blobs.places import objects
from tests.commands import PREFIX_SERVICE
from tests.conftest import Server, free_port, running_process
from tests.missing import not_tested
from tests.pages.markdown import PACKAGE
from tests.postgresql import PostgreSQL
from tests.seaweedfs import SeaweedFS

NAMES: Final = "abc"
"""The replicas, as the file of HAProxy names them."""


@dataclass
class Fleet:
    """Three replicas, of which each can be ended and started again, and the address of HAProxy before them."""

    folder: Path
    environment: dict[str, str]
    options: Sequence[str] = ()
    ports: list[int] = field(default_factory=lambda: [free_port() for _ in NAMES])
    url: str = ""
    admin_key: str = ""
    servers: dict[int, Server] = field(default_factory=dict)
    _running: dict[int, contextlib.ExitStack] = field(default_factory=dict)
    _clients: list[httpx.Client] = field(default_factory=list)

    def data_dir(self, number: int) -> Path:
        """Returns the data folder of a replica."""
        return self.folder / f"replica-{NAMES[number]}"

    def start(self, number: int, program: Sequence[str] = PREFIX_SERVICE, **environment: str) -> Server:
        """Starts a replica on its port, and waits until it is ready."""
        stack = contextlib.ExitStack()
        port = self.ports[number]
        more = {"PREFIX_ADVERTISE": f"http://127.0.0.1:{port}/", **self.environment, **environment}
        options = ("--port", str(port), *self.options)
        made = running_process(self.data_dir(number), *options, environment=more, program=program)
        server = self.servers[number] = stack.enter_context(made)
        self._running[number] = stack
        return server

    def stop(self, number: int) -> None:
        """Asks a replica to end, and waits; one that has ended is no error."""
        self._running.pop(number).close()
        del self.servers[number]

    def client(self) -> httpx.Client:
        """Returns an HTTP client of HAProxy with the platform admin's key."""
        client = httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {self.admin_key}"}, timeout=60)
        self._clients.append(client)
        return client

    def stop_all(self) -> None:
        """Asks all replicas to end, and waits."""
        for client in self._clients:
            client.close()
        with ThreadPoolExecutor(len(NAMES)) as pool:
            list(pool.map(self.stop, list(self._running)))


@dataclass(frozen=True)
class Engines:
    """What replicas share: a database, and a path in the tests' bucket."""

    postgresql: PostgreSQL
    seaweedfs: SeaweedFS
    database: str
    path: str

    @classmethod
    def new(cls, postgresql: PostgreSQL, seaweedfs: SeaweedFS) -> "Engines":
        """Makes an empty database and an empty path."""
        obstore.put(objects(seaweedfs.url), "made", b"the bucket")
        return cls(postgresql, seaweedfs, postgresql.new_database(), f"fleets/{uuid.uuid4().hex}")

    def environment(self, secret: Path) -> dict[str, str]:
        """Returns the variables of a replica; the file of its secret is made if it is missing."""
        if not secret.exists():
            secret.write_text(secrets.token_hex(32))
        own = {
            "PREFIX_CATALOG_URL": self.postgresql.url(self.database),
            "PREFIX_BLOBS_URL": f"s3://tests/{self.path}",
            "PREFIX_KEY_SECRET_FILE": str(secret),
        }
        return self.seaweedfs.environment | own


@contextlib.contextmanager
def running_fleet(
    engines: Engines,
    folder: Path,
    *options: str,
    environment: Mapping[str, str] | None = None,
    port: int | None = None,
    ports: Sequence[int] | None = None,
    program: Sequence[str] = PREFIX_SERVICE,
) -> Iterator[Fleet]:
    """Runs three replicas that start together, on `ports`, and HAProxy on `port`, until the block ends. They share
    `engines`, and may be run on them and on `folder` again."""
    folder.mkdir(parents=True, exist_ok=True)
    fleet = Fleet(folder, engines.environment(folder / "key.secret") | dict(environment or {}), options)
    if ports is not None:
        fleet.ports = list(ports)
    with contextlib.ExitStack() as stack:
        stack.callback(fleet.stop_all)
        with ThreadPoolExecutor(len(NAMES)) as pool:
            servers = list(pool.map(lambda number: fleet.start(number, program), range(len(NAMES))))
        fleet.admin_key = next((server.admin_key for server in servers if server.admin_key), "")
        fleet.url = stack.enter_context(haproxy(folder, fleet.ports, port))
        yield fleet


@contextlib.contextmanager
def haproxy(folder: Path, ports: Sequence[int], port: int | None = None) -> Iterator[str]:
    """Runs HAProxy with the file to copy, without TLS, before replicas on these ports; yields its address."""
    file, port = folder / "haproxy.cfg", port or free_port()
    file.write_text(haproxy_file(port, ports))
    with started([haproxy_program(), "-db", "-f", str(file)], port):
        yield f"http://127.0.0.1:{port}"


def haproxy_program() -> str:
    """Returns the program, which only CI must have."""
    return shutil.which("haproxy", path="/usr/sbin:/usr/bin") or not_tested("HAProxy is not installed")


def haproxy_file(port: int, ports: Sequence[int]) -> str:
    """Returns the file to copy with these ports of HAProxy and of the replicas, and without TLS."""
    text = (PACKAGE / "deploy" / "haproxy.cfg").read_text()
    text = re.sub(r"bind :443 .*", f"bind 127.0.0.1:{port}", text)
    for kind, rest in (("", ""), ("unready-", " no-check backup")):
        servers = zip(ascii_lowercase, ports, strict=False)
        lines = "".join(f"    server {kind}{name} 127.0.0.1:{replica}{rest}\n" for name, replica in servers)
        text = re.sub(rf"( +server {kind}[a-z] .*\n)+", lines, text)
    return text
