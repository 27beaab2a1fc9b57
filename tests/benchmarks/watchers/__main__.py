"""`python -m tests.benchmarks.watchers` measures what idle watchers add to one replica on PostgreSQL."""

import contextlib
import secrets
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final
from urllib.parse import urlsplit

import typer
from rich.console import Console

from tests.benchmarks.statements import counted
from tests.benchmarks.tables import Grid
from tests.benchmarks.watchers.crowd import crowd
from tests.conftest import Server, free_port, running_server
from tests.missing import not_tested
from tests.postgresql import PostgreSQL, binaries
from tests.processes import eventually, workers_of

_TENANTS: Final = 8
"""A tenant may have a quarter of the watchers."""
_WITHIN: Final = 300 * 10**6
_HEARTBEAT: Final = 15.0  # seconds
_WORKERS: Final = 2
"""A process can have half as many connections as files, and here a process may have 20,000 files."""


@dataclass(frozen=True, slots=True)
class Load:
    """What a replica costs for some seconds: its memory, and its processor time and statements in a second."""

    memory: int
    processor: float
    statements: float
    most: list[tuple[str, int]]


@dataclass(frozen=True, slots=True)
class Found:
    """A replica without watchers and with them; seconds until they were all there, and until each got one change."""

    watchers: int
    without: Load
    beside: Load
    opened: float
    told: float

    @property
    def added(self) -> int:
        """Returns the bytes of memory that the watchers add."""
        return self.beside.memory - self.without.memory


@contextlib.contextmanager
def replica(folder: Path, watchers: int) -> Iterator[tuple[Server, PostgreSQL]]:
    """Yields one replica that may have so many watchers, and its PostgreSQL."""
    server = PostgreSQL(binaries() or not_tested("PostgreSQL is not installed"), free_port())
    try:
        secret = folder / "shared.secret"
        secret.write_text(secrets.token_hex(32))
        environment = {
            "PREFIX_CATALOG_URL": server.url(server.new_database()),
            "PREFIX_KEY_SECRET_FILE": str(secret),
            "PREFIX_MAX_WATCHERS": str(2 * watchers),
            "PREFIX_MAX_CONNECTIONS": str(2 * watchers),
        }
        with running_server(folder / "data", "--workers", str(_WORKERS), environment=environment) as running:
            yield running, server
    finally:
        server.remove()


def measure(watchers: int, seconds: float, settled: float = _HEARTBEAT) -> Found:
    """Measures a replica without watchers and with them, each for so many seconds; `settled` seconds after the watchers
    have come."""
    with tempfile.TemporaryDirectory() as folder, replica(Path(folder), watchers) as (server, postgresql):
        admin, port = server.client(), urlsplit(server.url).port or 0
        keys = []
        for number in range(_TENANTS):
            admin.put(f"/v1/tenants/tenant-{number}").raise_for_status()
            made = admin.post(f"/v1/tenants/tenant-{number}/keys", json={"scope": "admin"}).raise_for_status()
            keys.append(made.json()["key"])
        with crowd(port, keys, 2 * _TENANTS):  # whatever the first ones need stays
            pass
        without = _load(server, postgresql, seconds)
        began = time.monotonic()
        with crowd(port, keys, watchers) as processes:
            opened = time.monotonic() - began
            time.sleep(settled)
            beside = _load(server, postgresql, seconds)
            began = time.monotonic()
            for number in range(_TENANTS):
                admin.put(f"/v1/tenants/tenant-{number}", json={"max_adapters": 9}).raise_for_status()

            def events() -> bool:
                for one in processes:
                    one.send("")
                received: list[int] = [one.recv() for one in processes]
                return sum(received) >= watchers

            eventually(events, 300)
            told = time.monotonic() - began
    return Found(watchers, without, beside, opened, told)


def _load(server: Server, postgresql: PostgreSQL, seconds: float) -> Load:
    pids = [server.process.pid, *workers_of(server.process.pid)]
    before = sum(map(_processor, pids))
    with counted(postgresql) as statements:
        time.sleep(seconds)
    used = sum(map(_processor, pids)) - before
    total = sum(statements.values())
    return Load(sum(map(_memory, pids)), used / seconds, total / seconds, statements.most_common(4))


def _memory(pid: int) -> int:
    """Returns the bytes of a process's memory that is its own."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("the kernel does not say how much memory a process has")


def _processor(pid: int) -> float:
    """Returns the seconds of processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


def grid(found: Found) -> Grid:
    """Returns the table of the page."""
    without, beside = found.without, found.beside
    rows = [
        ["memory", f"{without.memory / 1e6:.0f} MB", f"{beside.memory / 1e6:.0f} MB"],
        ["memory of each", "", f"{found.added / found.watchers / 1e3:.1f} kB"],
        ["processor", f"{100 * without.processor:.1f} %", f"{100 * beside.processor:.1f} %"],
        ["statements a second", f"{without.statements:.1f}", f"{beside.statements:.1f}"],
        ["all there after", "", f"{found.opened:.1f} s"],
        ["a change of each tenant has reached all after", "", f"{found.told:.1f} s"],
    ]
    return Grid("One idle replica", ["", "without watchers", f"with {found.watchers:,}"], rows)


def main(
    watchers: Annotated[int, typer.Option(min=8, help="Idle watchers.")] = 10_000,
    seconds: Annotated[float, typer.Option(min=1, help="How long each of the two is measured.")] = 30,
) -> None:
    """Exits with status 1 if the watchers add more than 300 MB for 10,000 of them."""
    console = Console()
    found = measure(watchers, seconds)
    console.print(grid(found).rich())
    for name, load in (("without", found.without), ("with", found.beside)):
        console.print(f"{name}: {load.most}", soft_wrap=True, highlight=False)
    raise SystemExit(found.added > _WITHIN * max(watchers, 1000) / 10_000)


if __name__ == "__main__":
    typer.run(main)
