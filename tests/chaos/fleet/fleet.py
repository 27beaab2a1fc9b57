"""Runs a fleet under chaos: replicas behind HAProxy, on PostgreSQL and SeaweedFS, each of which can be killed, stopped,
cut off and started again on the same port.
"""

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import httpx
import obstore

from tests.blobs.places import objects
from tests.chaos.fleet.clocks import Clock, library
from tests.chaos.fleet.relay import Relay, relaying
from tests.chaos.service import own_file_system
from tests.commands import PREFIX_SERVICE
from tests.conftest import NO_TLS, free_port
from tests.fleet.starting import haproxy_file, haproxy_program
from tests.missing import not_tested
from tests.postgresql import PostgreSQL, binaries
from tests.processes import eventually
from tests.seaweedfs import KEYS, SeaweedFS

_NAMES: Final = "abcd"
"""The replicas, of which the last runs only while it joins."""
_ENVIRONMENT: Final = {
    "PREFIX_GARBAGE_GRACE": "5",
    # This is so little that many reads are cold.
    "PREFIX_DEVICE_BYTES": str(2 << 20),
    "PREFIX_RENDERING_BYTES": str(2 << 20),
    "PREFIX_BLOB_CACHE_BYTES": str(1 << 20),
}


class Process:
    """A program that is started again and again, with one log."""

    def __init__(self, command: list[str], log: Path, environment: Mapping[str, str]) -> None:
        self._command, self.log, self._environment = command, log, dict(environment)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Returns the process id."""
        assert self._process is not None
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """Returns whether it was started, and has not ended."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Starts it, and returns before it is ready."""
        environment = {**os.environ, **self._environment}
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log, env=environment)

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """Kills it without warning, if it runs."""
        if self.is_running:
            assert self._process is not None
            self._process.kill()
            self._process.wait(30)

    def stop(self) -> int:
        """Ends it in order, and returns its exit status."""
        assert self._process is not None
        self._process.terminate()
        return self._process.wait(60)


class Replica:
    """One replica: its process, its data folder, and its clock."""

    def __init__(self, name: str, folder: Path, settings: Mapping[str, str], preloaded: Path | None) -> None:
        self.name, self.data_dir = name, folder / name / "data"
        self.clock = Clock(folder / f"{name}.clock", preloaded)
        self.port = free_port()
        command = [*PREFIX_SERVICE, "serve", "--port", str(self.port), "--data-dir", str(self.data_dir)]
        # It ends with the campaign, even if that is killed.
        command = ["setpriv", "--pdeathsig=KILL", *command]
        environment = {**_ENVIRONMENT, **settings, **self.clock.environment}
        self.process = Process(command, folder / f"{name}.log", environment)

    @property
    def url(self) -> str:
        """Returns its address."""
        return f"http://127.0.0.1:{self.port}"

    def is_ready(self) -> bool:
        """Returns whether it answers, and is ready.

        Raises:
            AssertionError: it has ended.
        """
        assert self.process.is_running, f"replica {self.name} ended:\n{self.process.log.read_text()[-2000:]}"
        try:
            return httpx.get(f"{self.url}/readyz", timeout=3, verify=NO_TLS).status_code == 200
        except httpx.TransportError:
            return False

    def empty(self) -> None:
        """Removes everything that its data folder holds."""
        for path in self.data_dir.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


class Fleet:
    """The parts of a fleet. Those that serve are `replicas`; `joining` waits."""

    def __init__(self, folder: Path, postgresql: PostgreSQL, seaweedfs: SeaweedFS) -> None:
        self.postgresql, self.seaweedfs = postgresql, seaweedfs
        self.database = postgresql.new_database()
        self.to_postgresql = Relay(free_port(), postgresql.port)
        self.to_s3 = Relay(free_port(), seaweedfs.port)
        secret = folder / "shared.secret"
        secret.write_text(secrets.token_hex(32))
        settings = KEYS | {
            "PREFIX_CATALOG_URL": f"postgresql+psycopg://postgres@127.0.0.1:{self.to_postgresql.port}/{self.database}",
            "PREFIX_KEY_SECRET_FILE": str(secret),
            "PREFIX_BLOBS_URL": "s3://tests/chaos",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.to_s3.port}",
        }
        preloaded = library(folder)
        self.why_no_clocks = None if preloaded else "there is no C compiler (cc)"
        *self.replicas, self.joining = [Replica(name, folder, settings, preloaded) for name in _NAMES]
        port = free_port()
        self.to_proxy = Relay(free_port(), port)
        self.url = f"http://127.0.0.1:{self.to_proxy.port}"
        configuration = folder / "haproxy.cfg"
        configuration.write_text(haproxy_file(port, [each.port for each in self.all]))
        command = ["setpriv", "--pdeathsig=KILL", haproxy_program(), "-db", "-f", str(configuration)]
        self.proxy = Process(command, folder / "haproxy.log", {})

    @property
    def all(self) -> list[Replica]:
        """Returns all replicas, also the one that waits."""
        return [*self.replicas, self.joining]

    @property
    def relays(self) -> list[Relay]:
        """Returns all relays."""
        return [self.to_postgresql, self.to_s3, self.to_proxy]

    @property
    def key(self) -> str:
        """Returns the platform admin's key, which one of the replicas made."""
        (key,) = {file.read_text().strip() for file in self._key_files}
        return key

    @property
    def _key_files(self) -> list[Path]:
        return [file for each in self.all if (file := each.data_dir / "bootstrap.key").exists()]

    def start(self) -> None:
        """Starts the replicas and the proxy, and returns before they are ready."""
        for each in self.replicas:
            each.process.start()
        self.proxy.start()

    def stop(self) -> int:
        """Stops the replicas and the proxy in order; returns the exit status of a replica that failed, or 0."""
        with ThreadPoolExecutor(len(self.replicas)) as pool:
            statuses = list(pool.map(lambda each: each.process.stop(), self.replicas))
        self.proxy.kill()
        return next((status for status in statuses if status), 0)

    def wait_until_ready(self, seconds: float = 120) -> None:
        """Waits until every replica is ready, and the proxy passes requests on.

        Raises:
            AssertionError: they are not within `seconds`, or one has ended.
        """
        for each in self.replicas:
            eventually(each.is_ready, seconds)

        def passes() -> bool:
            assert self.proxy.is_running, self.proxy.log.read_text()[-2000:]
            with contextlib.suppress(httpx.TransportError):
                return httpx.get(f"{self.url}/livez", timeout=3, verify=NO_TLS).status_code == 200
            return False

        eventually(passes, seconds)

    def client(self, timeout: float = 5) -> httpx.Client:
        """Returns an HTTP client of the proxy with the platform admin's key."""
        return self._client(self.url, timeout)

    def clients(self, timeout: float = 5) -> list[httpx.Client]:
        """Returns an HTTP client of each replica, without the proxy, with that key."""
        return [self.client_of(each, timeout) for each in self.replicas]

    def client_of(self, replica: Replica, timeout: float = 5) -> httpx.Client:
        """Returns an HTTP client of one replica, without the proxy, with that key."""
        return self._client(replica.url, timeout)

    def _client(self, url: str, timeout: float) -> httpx.Client:
        headers = {"Authorization": f"Bearer {self.key}"}
        return httpx.Client(base_url=url, headers=headers, timeout=timeout, verify=NO_TLS)

    def end(self) -> None:
        """Ends everything, whatever state it is in."""
        for process in (*(each.process for each in self.all), self.proxy):
            process.kill()


@contextlib.contextmanager
def fleet() -> Iterator[tuple[Fleet, str | None]]:
    """Yields a fleet that is ready, and why the last replica has no file system of its own, or None."""
    bin_ = binaries() or not_tested("PostgreSQL is not installed")
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-fleet-")))
        postgresql = PostgreSQL(bin_, free_port())
        stack.callback(postgresql.remove)
        seaweedfs = SeaweedFS(free_port)
        stack.callback(seaweedfs.remove)
        made = Fleet(folder, postgresql, seaweedfs)
        obstore.put(objects(seaweedfs.url), "made", b"the bucket")
        refused = stack.enter_context(own_file_system(folder / made.replicas[-1].name, 1200))
        for each in made.all:
            each.data_dir.mkdir(parents=True, exist_ok=True)
        stack.enter_context(relaying(made.relays))
        stack.callback(made.end)
        made.start()
        made.wait_until_ready()
        yield made, refused
