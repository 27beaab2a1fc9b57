"""Starts SeaweedFS, an S3-compatible server, for the tests."""

import contextlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

KEYS: Final = {"AWS_ACCESS_KEY_ID": "the-tests", "AWS_SECRET_ACCESS_KEY": "their-secret", "AWS_REGION": "us-east-1"}
"""The key of every S3 server of the tests, as `AWS_…` variables."""

_GRPC: Final = 10_000  # added to a port for the other protocol of the same part


class SeaweedFS:
    """A server in a temporary folder; it makes a bucket with its first object."""

    def __init__(self, free_port: Callable[[], int]) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="prefix-weed-"))
        self._program = Path(sys.executable).with_name("weed")
        names = ("master.port", "volume.port", "filer.port", "s3.port", "admin.port")
        self._ports = {name: free_port() for name in names}
        self.start()

    @property
    def port(self) -> int:
        """The TCP port of the server."""
        return self._ports["s3.port"]

    @property
    def url(self) -> str:
        """The address of the server."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """The variables by which clients find the server."""
        return KEYS | {"AWS_ENDPOINT_URL": self.url}

    def start(self) -> None:
        """Starts the server, and waits until it answers."""
        ports = (f"-{name}={port}" for name, port in self._ports.items())
        only = ("-webdav=false", "-admin.ui=false", "-s3.port.iceberg=0", "-s3.port.lance=0")
        address = ("-ip=127.0.0.1", "-ip.bind=127.0.0.1")
        # The server ends with these tests, even if they are killed.
        command = ["setpriv", "--pdeathsig=KILL", str(self._program), "mini", f"-dir={self._folder}", *address, *ports]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [*command, *only], stdout=log, stderr=log, env=KEYS | {"HOME": str(self._folder)}, cwd=self._folder
            )
        deadline = time.monotonic() + 60
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"SeaweedFS did not start:\n{(self._folder / 'log').read_text()[-3000:]}")
            time.sleep(0.05)

    def stop(self) -> None:
        """Kills the server."""
        self._process.kill()
        self._process.wait(30)

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """Kills the server until the block ends."""
        self.stop()
        try:
            yield
        finally:
            self.start()

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Stops the server, whose kernel goes on to accept connections, until the block ends."""
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def remove(self) -> None:
        """Kills the server, and removes its folder."""
        self.stop()
        shutil.rmtree(self._folder)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(self.url, timeout=5):  # noqa: S310 - the address is of this machine
                return True
        except urllib.error.HTTPError:
            return True
        except OSError:
            return False
