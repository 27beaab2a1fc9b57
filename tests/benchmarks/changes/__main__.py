"""`python -m tests.benchmarks.changes` measures how soon three replicas follow a moved alias and a revoked key, with
PostgreSQL's notifications and without, and what the replicas cost PostgreSQL; it writes README.md.
"""

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console

from tests.benchmarks.changes.measure import Cost, Followed, Measuring, Watched, Written
from tests.benchmarks.fleet import percentile
from tests.benchmarks.tables import Grid
from tests.conftest import free_port
from tests.fleet.starting import Engines, running_fleet
from tests.missing import not_tested
from tests.postgresql import PostgreSQL, binaries
from tests.seaweedfs import SeaweedFS

HERE: Final = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Found:
    """Everything that is measured of a fleet."""

    notified: Followed
    unnotified: Followed
    written: Written
    watched: Watched
    idle: Cost
    loaded: Cost


@contextlib.contextmanager
def engines() -> Iterator[Engines]:
    """Yields PostgreSQL and SeaweedFS."""
    with contextlib.ExitStack() as stack:
        postgresql = PostgreSQL(binaries() or not_tested("PostgreSQL is not installed"), free_port())
        stack.callback(postgresql.remove)
        seaweedfs = SeaweedFS(free_port)
        stack.callback(seaweedfs.remove)
        yield Engines.new(postgresql, seaweedfs)


def measure(made: Engines, folder: Path, changes: int, seconds: float) -> Found:
    """Measures so many changes of each kind, and what the replicas cost for so many seconds."""
    with running_fleet(made, folder) as fleet:
        measuring = Measuring(fleet)
        idle = measuring.cost(made, seconds, under_load=False)
        loaded = measuring.cost(made, seconds, under_load=True)
        notified = measuring.followed(changes)
        written, watched = measuring.written(changes), measuring.watched(changes)
        made.postgresql.cut_notifications_off(made.database)
        made.postgresql.end_sessions(made.database)
        unnotified = measuring.followed(changes)
    return Found(notified, unnotified, written, watched, idle, loaded)


def grids(found: Found, replicas: int = 3) -> dict[str, Grid]:
    """Returns the tables of the page."""

    def times(name: str, seconds: list[float]) -> list[str]:
        return [name, str(len(seconds)), *(f"{1000 * percentile(seconds, share):.0f}" for share in (0.5, 0.99, 1))]

    followed = [
        times("a moved alias, with notifications", found.notified.moves),
        times("a revoked key, with notifications", found.notified.revocations),
        times("a moved alias, without", found.unnotified.moves),
        times("a revoked key, without", found.unnotified.revocations),
        times("a watching client knows of a move, and has the bytes", found.watched.seconds),
        times("a read at a replica with Prefix-Min-Revision", found.written.seconds),
    ]
    counts = [
        ["reads with Prefix-Min-Revision that were stale", f"{found.written.stale} of {len(found.written.seconds)}"],
        ["such reads that were refused", f"{found.written.refused} of {len(found.written.seconds)}"],
        ["requests of a watching client's first reads after moves", str(found.watched.cold)],
    ]

    def cost(name: str, one: Cost) -> list[str]:
        return [name, f"{one.requests / replicas:.0f}", f"{one.statements / replicas:.1f}"]

    costs = [cost("idle", found.idle), cost("workers read what is in memory", found.loaded)]
    return {
        "FOLLOWED": Grid("Until the last replica follows, ms", ["", "times", "p50", "p99", "longest"], followed),
        "COUNTS": Grid("What must be none", ["", "seen"], counts),
        "COSTS": Grid("Of each replica, in a second", ["", "requests", "statements"], costs),
    }


def main(
    changes: Annotated[int, typer.Option(min=1, help="Changes of each kind.")] = 100,
    seconds: Annotated[float, typer.Option(min=1, help="How long statements are counted, twice.")] = 30,
) -> None:
    """Prints the tables, and writes the page."""
    with engines() as made, tempfile.TemporaryDirectory() as folder:
        found = grids(measure(made, Path(folder), changes, seconds))
    console, page = Console(), (HERE / "page.md").read_text()
    for name, grid in found.items():
        console.print(grid.rich())
        page = page.replace(f"<!-- {name} -->", grid.markdown())
    (HERE / "README.md").write_text(page)


if __name__ == "__main__":
    typer.run(main)
