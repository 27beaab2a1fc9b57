"""Starts real servers for every suite by `prefix-service serve`, in processes of their own."""

import contextlib
import json
import os
import secrets
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import httpx
import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, settings
from xdist.remote import Producer

from prefix_service.catalog.database import Database
from prefix_service.data_folder.opening import catalog_file
from tests.commands import PREFIX_SERVICE, run_command
from tests.forked import Forked
from tests.missing import not_tested
from tests.postgresql import PostgreSQL, binaries
from tests.seaweedfs import SeaweedFS
from tests.turns import FilesInTurn, longest_first

# Slow machines are no failure. `pytest --hypothesis-profile=thorough` tries more examples, and others each time.
settings.register_profile("thorough", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("gate", settings.get_profile("thorough"), derandomize=True, max_examples=50)
settings.load_profile("gate")

CORPUS = Path(__file__).parent / "data" / "corpus"
NO_TLS: Final = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""A context without authorities, because reading the system's takes longer than most tests."""


Process = subprocess.Popen[bytes] | Forked


@dataclass
class Server:
    """A running service: its URL, its data folder, and the platform admin's key."""

    url: str
    data_dir: Path
    admin_key: str
    process: Process
    log: Path
    uds: Path | None = None
    _clients: list[httpx.Client] = field(default_factory=list)

    def client(self, key: str | None = None) -> httpx.Client:
        """Returns an HTTP client with this key, by default the platform admin's; "" stands for no key."""
        key = self.admin_key if key is None else key
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        transport = httpx.HTTPTransport(verify=NO_TLS, uds=None if self.uds is None else str(self.uds))
        client = httpx.Client(base_url=self.url, headers=headers, timeout=60, transport=transport)
        self._clients.append(client)
        return client

    def key(self, scope: str, tenant: str | None = None) -> str:
        """Returns a new key, made by the command line on the running service's catalog."""
        owner = ["--platform"] if tenant is None else ["--tenant", tenant]
        text: str = json.loads(self.command("key", "create", *owner, "--scope", scope, "--json"))["key"]
        return text

    def command(self, *arguments: str) -> str:
        """Runs the command line on the running service's catalog, and returns what it prints."""
        done = run_command(*arguments, "--data-dir", self.data_dir)
        assert done.returncode == 0, done.stderr
        return done.stdout

    @contextlib.contextmanager
    def writing(self) -> Iterator[sa.Connection]:
        """Yields a transaction on the running service's catalog. The service gets no notification of its changes."""
        with contextlib.closing(Database(self._catalog())) as database, database.writing() as connection:
            yield connection

    def folders(self) -> list[Path]:
        """Returns the data folder of each process that serves."""
        return [self.data_dir]

    def pids(self) -> list[int]:
        """Returns the id of each process that serves."""
        return [self.process.pid]

    def logs(self) -> str:
        """Returns what all processes that serve have logged."""
        return self.log.read_text()

    def _catalog(self) -> Path | str:
        return catalog_file(self.data_dir)

    def stop(self) -> None:
        """Asks the service to end, and waits."""
        for client in self._clients:
            client.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(timeout=90)


Serving = Callable[
    [Path, Sequence[str], dict[str, str], Path | None, Sequence[str]], contextlib.AbstractContextManager[Server]
]

_in_place_of_one: Serving | None = None
"""Runs a fleet wherever tests start one service; see `tests/fleet/suite.py`."""


@contextlib.contextmanager
def running_server(
    data_dir: Path,
    *options: str,
    environment: dict[str, str] | None = None,
    uds: Path | None = None,
    program: Sequence[str] = PREFIX_SERVICE,
) -> Iterator[Server]:
    """Runs a service until the block ends: one process, or with `pytest --fleet` three replicas behind HAProxy."""
    if _in_place_of_one is not None:
        with _in_place_of_one(data_dir, options, environment or {}, uds, program) as fleet:
            yield fleet
        return
    with running_process(data_dir, *options, environment=environment, uds=uds, program=program) as server:
        yield server


@contextlib.contextmanager
def running_process(
    data_dir: Path,
    *options: str,
    environment: dict[str, str] | None = None,
    uds: Path | None = None,
    program: Sequence[str] = PREFIX_SERVICE,
) -> Iterator[Server]:
    """Runs `prefix-service serve`, ready, on a free port unless the options name one, until the block ends."""
    port = options[options.index("--port") + 1] if "--port" in options else str(free_port())
    data_dir.mkdir(parents=True, exist_ok=True)
    log = data_dir / "serve.log"
    arguments = ["serve", "--port", port, "--data-dir", str(data_dir), *options]
    process = _started(program, arguments, log, environment or {})
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_until_ready(url, process, log, uds)
    except BaseException:
        process.kill()
        raise
    key_file = data_dir / "bootstrap.key"
    server = Server(url, data_dir, key_file.read_text().strip() if key_file.exists() else "", process, log, uds)
    try:
        yield server
    finally:
        server.stop()


_AT_IMPORT: Final = {"PYTHONPATH", "OMP_NUM_THREADS"}
"""Variables that are read before a service runs."""


def _started(program: Sequence[str], arguments: list[str], log: Path, more: dict[str, str]) -> Process:
    environment = {**os.environ, **more}
    can_fork = program == PREFIX_SERVICE and not _AT_IMPORT & more.keys()
    if can_fork and "PYTEST_VERSION" in environment and "COVERAGE_PROCESS_CONFIG" not in environment:
        return Forked(arguments, log, environment)
    with log.open("wb") as output:
        return subprocess.Popen([*program, *arguments], stdout=output, stderr=output, env=environment)


def free_port() -> int:
    """Returns a TCP port that nobody listens on. The system assigns higher ones, so it is still free a moment later."""
    while True:
        port = secrets.choice(range(10_000, 32_768))
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _wait_until_ready(url: str, process: Process, log: Path, uds: Path | None) -> None:
    deadline = time.monotonic() + 180
    transport = httpx.HTTPTransport(verify=NO_TLS, uds=None if uds is None else str(uds))
    with httpx.Client(transport=transport) as client:
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise RuntimeError(f"the server ended with status {process.returncode}:\n{log.read_text()}")
            if uds is not None and not _is_listening(uds):  # httpcore leaves a socket open that found nobody
                time.sleep(0.05)
                continue
            try:
                if client.get(f"{url}/readyz").status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.05)
    raise RuntimeError(f"the server is not ready after three minutes:\n{log.read_text()}")


def _is_listening(uds: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(uds)) == 0


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Yields one service for all tests that need no other settings; each test uses tenants of its own."""
    with running_server(tmp_path_factory.mktemp("server") / "data") as running:
        yield running


@pytest.fixture
def admin(server: Server) -> httpx.Client:
    """Returns an HTTP client with the platform admin's key."""
    return server.client()


@pytest.fixture(scope="session")
def postgresql() -> Iterator[PostgreSQL]:
    """Yields a PostgreSQL server of these tests, which only CI must have."""
    bin_ = binaries()
    if bin_ is None:
        not_tested("PostgreSQL is not installed")
    server = PostgreSQL(bin_, free_port())
    yield server
    server.remove()


@pytest.fixture(scope="session")
def seaweedfs() -> Iterator[SeaweedFS]:
    """Yields an S3-compatible server of these tests."""
    server = SeaweedFS(free_port)
    yield server
    server.remove()


Publish = Callable[..., httpx.Response]


@pytest.fixture
def publish(admin: httpx.Client) -> Publish:
    """Returns a function that uploads an adapter as the platform admin: `publish(tenant, name, directory)`."""

    def upload(tenant: str, name: str, directory: Path) -> httpx.Response:
        files = {
            "adapter_config.json": (directory / "adapter_config.json").read_bytes(),
            "adapter_model.safetensors": (directory / "adapter_model.safetensors").read_bytes(),
        }
        return admin.post(f"/v1/tenants/{tenant}/adapters/{name}/versions", files=files)

    return upload


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fleet", action="store_true", help="run fleets in the place of each service that tests start")
    help_ = "the same, and each PrefixClient of HAProxy's address knows the replicas' addresses instead"
    parser.addoption("--fleet-addresses", action="store_true", help=help_)


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("fleet") or config.getoption("fleet_addresses"):
        from tests.fleet.suite import FleetSuite

        global _in_place_of_one
        suite = FleetSuite(by_addresses=config.getoption("fleet_addresses"))
        _in_place_of_one = suite.serving
        config.pluginmanager.register(suite)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    longest_first(items)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> FilesInTurn | None:
    return FilesInTurn(config, log) if config.getoption("dist") == "loadfile" else None
