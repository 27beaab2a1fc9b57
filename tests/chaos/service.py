"""Runs the service under chaos: two workers on a data folder, killed and started again on the same port."""

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import httpx

from tests.commands import PREFIX_SERVICE
from tests.conftest import free_port
from tests.mounts import refusal, unmount
from tests.processes import eventually, lines_of, workers_of

_ENVIRONMENT = {
    "PREFIX_GARBAGE_GRACE": "5",
    # This is so little that many reads are cold.
    "PREFIX_DEVICE_BYTES": str(2 << 20),
    "PREFIX_RENDERING_BYTES": str(2 << 20),
}


class Service:
    """A service on `data_dir`, with its log next to it, on another file system if the folder has its own."""

    def __init__(self, data_dir: Path, log: Path) -> None:
        self.data_dir, self.log = data_dir, log
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts the service and returns before it is ready; processes on the folder must end within seconds."""
        arguments = ["serve", "--port", str(self.port), "--data-dir", str(self.data_dir), "--workers", "2"]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*PREFIX_SERVICE, *arguments], stdout=log, stderr=log, env={**os.environ, **_ENVIRONMENT}
            )

    def wait_until_ready(self, seconds: float = 120) -> None:
        """Waits until both workers are ready.

        Raises:
            AssertionError: they are not within `seconds`, or the service ended.
        """

        def ready() -> bool:
            assert self._process is not None
            assert self._process.poll() is None, f"the service ended:\n{self.log.read_text()[-2000:]}"
            return len(self.ready_workers()) == 2

        eventually(ready, seconds)

    def ready_workers(self) -> list[int]:
        """Returns the workers that live and have been ready."""
        ready = {line["pid"] for line in lines_of(self.log, "a worker is ready")}
        return [worker for worker in self.workers() if worker in ready]

    def ready_since(self, worker: int) -> float | None:
        """Returns when a worker became ready, in seconds since the epoch."""
        for line in lines_of(self.log, "a worker is ready"):
            if line["pid"] == worker:
                return datetime.fromisoformat(line["timestamp"]).timestamp()
        return None

    @property
    def pid(self) -> int:
        """Returns the supervisor's process id."""
        assert self._process is not None
        return self._process.pid

    def workers(self) -> list[int]:
        """Returns the workers that live."""
        try:
            return workers_of(self.pid)
        except FileNotFoundError:
            return []

    @property
    def key(self) -> str:
        """Returns the platform admin's key."""
        return (self.data_dir / "bootstrap.key").read_text().strip()

    def client(self, timeout: float = 5) -> httpx.Client:
        """Returns an HTTP client with that key."""
        return httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {self.key}"}, timeout=timeout)

    def clients(self, timeout: float = 5) -> list[httpx.Client]:
        """Returns an HTTP client for each address, of which a service has one."""
        return [self.client(timeout)]

    def kill(self) -> None:
        """Kills the supervisor without warning."""
        os.kill(self.pid, signal.SIGKILL)
        assert self._process is not None
        self._process.wait()

    def stop(self) -> int:
        """Stops the service in order, and returns its exit status."""
        assert self._process is not None
        self._process.terminate()
        return self._process.wait(timeout=60)

    def end(self) -> None:
        """Ends the service, whatever state it is in."""
        if self._process is not None and self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGCONT)
            self._process.kill()
            self._process.wait()


@contextlib.contextmanager
def own_file_system(place: Path, megabytes: int = 64) -> Iterator[str | None]:
    """Mounts a small file system on `place` until the block ends; yields why it could not, or None."""
    place.mkdir()
    refused = refusal("-t", "tmpfs", "-o", f"size={megabytes}m", "chaos", str(place))
    try:
        yield refused
    finally:
        if refused is None:
            unmount(place)


def code_of(answer: httpx.Response) -> str:
    """Returns status and code of a failed answer, as `503 storage-failed`."""
    try:
        return f"{answer.status_code} {answer.json()['code']}"
    except (json.JSONDecodeError, KeyError, TypeError):
        return str(answer.status_code)


def now() -> float:
    """Returns the seconds since the epoch, as the log has them."""
    return time.time()
