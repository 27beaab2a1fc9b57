"""Lets a suite that was written for one service run against fleets: `pytest tests/api --fleet`.

Every service that a test starts is then three replicas behind HAProxy. What tests ask of one process (its data folder,
its log, its memory) a fleet does not have: such a test skips, and says what it asked for. So does a test that is marked
with `one_process`.

With `pytest tests/client --fleet-addresses` each client that is given HAProxy's address gets those of the replicas, and
spreads its requests itself.
"""

import contextlib
import functools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

import httpx
import pytest

from prefix_service.client.client import _Client
from tests.commands import run_command
from tests.conftest import NO_TLS, Server, free_port
from tests.fleet.starting import NAMES, Engines, Fleet, running_fleet
from tests.missing import not_tested
from tests.postgresql import PostgreSQL, binaries
from tests.seaweedfs import SeaweedFS

_SKIPPED: Final = "ONE PROCESS ALONE: "
_ON_A_FLEET: Final = ("on a fleet", True)
_FOLDERS: Final = {
    "framing": "HAProxy reads requests first",
    "server": "it is about connections, and HAProxy has those of callers",
    "processes": "it is about the workers of one service",
    "metrics": "each replica has its own metrics",
}
"""Folders of `tests/api` that are about one process, and why."""


def one_process_alone(reason: str) -> NoReturn:
    """Skips a test that a fleet cannot run, loudly."""
    pytest.skip(f"{_SKIPPED}{reason}")
    raise AssertionError("unreachable")


class FleetServer(Server):
    """A fleet in the place of one service. Attributes that belong to one process skip the test."""

    def __init__(self, fleet: Fleet, suite: "FleetSuite") -> None:
        self.admin_key, self._fleet, self._suite, self._clients = fleet.admin_key, fleet, suite, []
        self._direct = httpx.Client(timeout=60, verify=NO_TLS)

    @property
    def url(self) -> str:  # type: ignore[override]  # a field of one service
        """The address of HAProxy."""
        self._suite.note_use()
        return self._fleet.url

    def __getattr__(self, name: str) -> NoReturn:
        one_process_alone(f"it looks at {name!r} of the service")

    def client(self, key: str | None = None) -> httpx.Client:
        """Returns a client whose writes are known to every replica before they return: these tests do not wait."""
        client = super().client(key)
        client.event_hooks = {"request": [lambda _: self._suite.note_use()], "response": [self._settle]}
        return client

    def _settle(self, answer: httpx.Response) -> None:
        revision, key = answer.headers.get("Prefix-Revision"), answer.request.headers.get("Authorization")
        if revision is not None and key is not None:
            for server in self._fleet.servers.values():
                headers = {"Authorization": key, "Prefix-Min-Revision": revision}
                self._direct.get(f"{server.url}/v1/whoami", headers=headers)

    def command(self, *arguments: str) -> str:
        """Runs the command line on the catalog, and returns what it prints."""
        where = ("--data-dir", self._fleet.data_dir(0))
        done = run_command(*arguments, *where, environment=self._fleet.environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def folders(self) -> list[Path]:
        """Returns the data folder of each replica."""
        return [server.data_dir for server in self._fleet.servers.values()]

    def pids(self) -> list[int]:
        """Returns the id of each replica's process."""
        return [server.process.pid for server in self._fleet.servers.values()]

    def logs(self) -> str:
        """Returns what all replicas have logged."""
        return "".join(server.log.read_text() for server in self._fleet.servers.values())

    def _catalog(self) -> str:
        return self._fleet.environment["PREFIX_CATALOG_URL"]

    def stop(self) -> None:
        """Closes the clients; the replicas end with their fleet."""
        for client in (*self._clients, self._direct):
            client.close()


class FleetSuite:
    """Starts the fleets of a test session, and counts which tests ran on one. With `by_addresses` clients know their
    replicas."""

    def __init__(self, *, by_addresses: bool) -> None:
        self._postgresql: PostgreSQL | None = None
        self._seaweedfs: SeaweedFS | None = None
        self._engines: dict[Path, Engines] = {}
        self._test: pytest.Item | None = None  # that runs
        self._counts: Counter[str] = Counter()
        self._ports: dict[Path, list[int]] = {}  # of the replicas on a folder
        self._addresses: dict[str, list[str]] = {}  # of the replicas, by that of HAProxy
        if by_addresses:
            self._lead_clients()

    def _lead_clients(self) -> None:
        make = _Client.__init__

        @functools.wraps(make)
        def make_led(client: _Client, base_url: Any = None, *arguments: Any, **options: Any) -> None:
            if isinstance(base_url, str) and options.get("http") is None:  # a foreign transport has one address
                base_url = self._addresses.get(base_url, base_url)
            make(client, base_url, *arguments, **options)

        _Client.__init__ = make_led  # type: ignore[assignment,method-assign]

    @contextlib.contextmanager
    def serving(
        self,
        data_dir: Path,
        options: Sequence[str],
        environment: Mapping[str, str],
        uds: Path | None,
        program: Sequence[str],
    ) -> Iterator[Server]:
        """Runs a fleet in the place of one service; one that starts on the same folder again has the same catalog."""
        if uds is not None:
            one_process_alone("it uses a Unix socket")
        port, left = free_port(), list(options)
        if "--port" in left:
            at = left.index("--port")
            port = int(left[at + 1])
            del left[at : at + 2]
        if data_dir not in self._engines:
            self._engines[data_dir], self._ports[data_dir] = Engines.new(*self._servers()), [free_port() for _ in NAMES]
        engines, ports = self._engines[data_dir], self._ports[data_dir]
        with running_fleet(
            engines, data_dir, *left, environment=environment, port=port, ports=ports, program=program
        ) as fleet:
            server = FleetServer(fleet, self)
            self._addresses[fleet.url] = [each.url for each in fleet.servers.values()]
            try:
                yield server
            finally:
                server.stop()

    def note_use(self) -> None:
        """Notes that the present test asks a fleet, in its report, which may be of another process."""
        if self._test is not None and _ON_A_FLEET not in self._test.user_properties:
            self._test.user_properties.append(_ON_A_FLEET)

    def _servers(self) -> tuple[PostgreSQL, SeaweedFS]:
        if self._postgresql is None or self._seaweedfs is None:
            bin_ = binaries() or not_tested("PostgreSQL is not installed")
            self._postgresql, self._seaweedfs = PostgreSQL(bin_, free_port()), SeaweedFS(free_port)
        return self._postgresql, self._seaweedfs

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            marker = item.get_closest_marker("one_process")
            if reason := marker.args[0] if marker else _FOLDERS.get(item.path.parent.name):
                item.add_marker(pytest.mark.skip(reason=f"{_SKIPPED}{reason}"))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        self._test = item

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped:
            says = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
            self._counts["need one process" if _SKIPPED in says else "skipped"] += 1
        elif report.when == "call":
            used = _ON_A_FLEET in map(tuple, report.user_properties)
            self._counts[("passed" if report.passed else "FAILED") + (" on a fleet" if used else "")] += 1

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.section("fleet")
        for what, count in sorted(self._counts.items()):
            terminalreporter.line(f"{count:6} {what}{' without any service' if what in ('passed', 'FAILED') else ''}")

    def pytest_unconfigure(self) -> None:
        for server in (self._postgresql, self._seaweedfs):
            if server is not None:
                server.remove()
