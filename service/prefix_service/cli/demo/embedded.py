"""A service of one's own: started for the demo on a free port, with its keys, stopped when it ends."""

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from prefix_service.client import PrefixClient
from prefix_service.errors import ConnectionFailed, NotFound, Unavailable


@dataclass(frozen=True, slots=True)
class Embedded:
    """The address of the demo's service, and its platform admin's key."""

    url: str
    api_key: str
    process: subprocess.Popen[bytes]


@contextlib.contextmanager
def embedded_service(data_dir: Path) -> Iterator[Embedded]:
    """`prefix-service serve` in a process of its own, ready when the block begins.

    Raises:
        Unavailable: it did not start; the message holds what it printed.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = data_dir / "serve.log"
    command = [sys.executable, "-m", "prefix_service.cli", "serve", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--data-dir", str(data_dir)]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)  # noqa: S603 - this interpreter, our module
    url = f"http://127.0.0.1:{port}"
    try:
        _wait(url, process, log)
        yield Embedded(url, (data_dir / "bootstrap.key").read_text().strip(), process)
    finally:
        process.terminate()
        process.wait(timeout=30)


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    with PrefixClient(url, timeout=1) as client:
        while time.monotonic() < deadline and process.poll() is None:
            try:
                if client.is_ready():
                    return
            except (ConnectionFailed, Unavailable, NotFound):
                time.sleep(0.05)
    raise Unavailable(f"the service did not start: {log.read_text()[-2000:]}")
