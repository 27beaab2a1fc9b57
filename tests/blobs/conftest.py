"""Moto's S3 server in the process of the tests, and a disk that is soon full."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from moto.server import ThreadedMotoServer

from tests.missing import not_tested


@pytest.fixture(scope="session")
def moto() -> Iterator[str]:
    """Yields the address of an S3 server in memory, with the tests' bucket."""
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    address = f"http://{host}:{port}"
    httpx.put(f"{address}/tests", timeout=60).raise_for_status()  # it imports much at its first request
    yield address
    server.stop()


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """Yields the mount point of a file system of 1 MiB."""
    place = tmp_path / "tiny"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        not_tested("a full disk, because this user may not mount a tmpfs")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)
