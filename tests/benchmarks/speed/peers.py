"""Starts the peers of the service, each in a process of its own, until the block ends."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.speed.harness import warn_missing
from tests.benchmarks.speed.load import Address
from tests.conftest import free_port

_NGINX = """
daemon off;
{user}
worker_processes 1;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{ worker_connections 1024; }}
http {{
    access_log off;
    sendfile on;
    tcp_nopush on;
    keepalive_requests 1000000000;
    keepalive_timeout 1h;
    types {{ application/vnd.safetensors safetensors; }}
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    server {{ listen 127.0.0.1:{port}; root {root}; }}
}}
"""


@dataclass(frozen=True, slots=True)
class Running:
    """A peer that has started."""

    address: Address
    pid: int


@contextmanager
def python_peer(app: str, files: Path) -> Iterator[Running]:
    """Runs one of `apps` on the files of a folder."""
    port = free_port()
    command = [sys.executable, "-m", "tests.benchmarks.speed.apps", app, str(port), str(files)]
    with started(command, port) as running:
        yield running


@contextmanager
def nginx(root: Path, folder: Path) -> Iterator[Address | None]:
    """Runs nginx with `sendfile` on the files in `root`, with one worker; yields None if it is not installed."""
    program = nginx_program()
    if program is None:
        warn_missing("nginx", "nginx-light")
        yield None
        return
    folder.mkdir()
    port = free_port()
    user = "user root;" if os.geteuid() == 0 else ""
    (folder / "nginx.conf").write_text(_NGINX.format(user=user, folder=folder, root=root, port=port))
    with started([program, "-p", str(folder), "-c", str(folder / "nginx.conf")], port) as running:
        yield running.address


@contextmanager
def redis(values: dict[str, bytes]) -> Iterator[Address | None]:
    """Runs Redis with these values and no writes to the disk; yields None if it is not installed."""
    program = shutil.which("redis-server")
    if program is None:
        warn_missing("Redis", "redis-server")
        yield None
        return
    port = free_port()
    command = [program, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    with started(command, port) as running:
        with socket.create_connection(running.address, timeout=60) as connection:
            for key, value in values.items():
                connection.sendall(command_of("SET", key) + b"$%d\r\n" % len(value) + value + b"\r\n")
                if (told := connection.recv(1024)) != b"+OK\r\n":
                    raise RuntimeError(f"Redis: {told!r}")
        yield running.address


def command_of(name: str, key: str) -> bytes:
    """Returns a command of Redis for a key; after `SET` follows the value."""
    count = {"GET": 2, "SET": 3}[name]
    return f"*{count}\r\n$3\r\n{name}\r\n${len(key)}\r\n{key}\r\n".encode()


def nginx_program() -> str | None:
    """Returns the path of nginx, which is not always on the path of those who are not root."""
    return shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")


def version_of(program: str) -> str:
    """Returns the first line of a program's version, or "" if it is missing."""
    path = nginx_program() if program == "nginx" else shutil.which(program)
    if path is None:
        return ""
    done = subprocess.run([path, "-v"], capture_output=True, text=True, check=True)
    return (done.stdout + done.stderr).splitlines()[0]


@contextmanager
def started(command: list[str], port: int) -> Iterator[Running]:
    """Runs a program that listens on a port of this machine."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 30
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{command[0]} did not start: {' '.join(command)}") from None
                time.sleep(0.05)
        yield Running(("127.0.0.1", port), process.pid)
    finally:
        process.terminate()
        process.wait(timeout=30)
