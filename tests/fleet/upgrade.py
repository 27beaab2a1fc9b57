"""`python -m tests.fleet.upgrade [COMMIT]` replaces the replicas of a fleet in use, one after another: they run an
older commit first, and the working tree at the end.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Annotated, Final

import httpx
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from prefix_service.client import PrefixClient
from tests.chaos.campaign import Campaign
from tests.chaos.truth import Truth
from tests.chaos.work import Callers, Seen
from tests.commands import PREFIX_SERVICE
from tests.conftest import NO_TLS, free_port
from tests.fleet.starting import NAMES, Engines, Fleet, running_fleet
from tests.postgresql import PostgreSQL, binaries
from tests.seaweedfs import SeaweedFS

_ROOT: Final = Path(__file__).parents[2]
_BETWEEN: Final = 0.05  # seconds between two requests of one caller
console = Console()


@dataclass(frozen=True)
class Upgraded:
    """A fleet as its callers and the comparison reach it."""

    fleet: Fleet

    @property
    def key(self) -> str:
        """Returns the platform admin's key."""
        return self.fleet.admin_key

    def client(self, timeout: float = 30) -> httpx.Client:
        """Returns an HTTP client of HAProxy with that key."""
        return self._client(self.fleet.url, timeout)

    def clients(self, timeout: float = 30) -> list[httpx.Client]:
        """Returns an HTTP client for each replica."""
        return [self._client(server.url, timeout) for server in self.fleet.servers.values()]

    def start(self) -> None:
        """Starts every replica."""
        for number in range(len(NAMES)):
            self.fleet.start(number)

    def stop(self) -> int:
        """Stops every replica in order."""
        self.fleet.stop_all()
        return 0

    def wait_until_ready(self) -> None:
        """Does nothing: a replica is ready when its start returns."""

    def _client(self, url: str, timeout: float) -> httpx.Client:
        headers = {"Authorization": f"Bearer {self.key}"}
        return httpx.Client(base_url=url, headers=headers, timeout=timeout, verify=NO_TLS)


class UpgradeWork(Callers):
    """Owners of adapters, readers through HAProxy, and workers that know HAProxy or every replica."""

    def __init__(self, upgraded: Upgraded, truth: Truth) -> None:
        super().__init__(upgraded, truth, _BETWEEN)
        self._fleet = upgraded.fleet

    def loops(self) -> list[Callable[[], None]]:
        """Returns what the callers do until they are stopped."""
        addresses = [f"http://127.0.0.1:{port}" for port in self._fleet.ports]
        workers = [partial(self._read_as_worker, url) for url in (self._fleet.url, addresses)]
        return [*super().loops(), *[self._read_raw] * 2, *workers]

    def _read_as_worker(self, url: str | list[str]) -> None:
        with PrefixClient(url, self._fleet.admin_key, timeout=10, cache_bytes=1 << 18) as client:
            self.read_by(client, Random(0))  # noqa: S311 - any order will do


@dataclass
class Step:
    """What callers saw while one replica was replaced."""

    name: str
    reads: int
    writes: int
    errors: Counter[str]


@dataclass
class Upgrade:
    """A fleet in use, and what happened so far."""

    fleet: Fleet
    truth: Truth
    work: UpgradeWork
    steps: list[Step] = field(default_factory=list)

    def observe(self, name: str, change: Callable[[], object], seconds: float) -> None:
        """Makes a change, lets the work go on for so many seconds, and adds what was seen."""
        self.work.seen = seen = Seen()
        change()
        time.sleep(seconds)
        self.steps.append(Step(name, len(seen.reads), len(seen.writes), seen.errors))

    def replace(self, number: int, seconds: float) -> None:
        """Stops a replica in order, and starts one of the working tree in its place."""

        def change() -> None:
            self.fleet.stop(number)
            self.fleet.start(number)

        self.observe(f"replica {NAMES[number]} replaced", change, seconds)

    def compare(self) -> None:
        """Compares everything that was acknowledged with the answers of each replica."""
        Campaign(Upgraded(self.fleet), self.truth, self.work, None).replay()


@contextlib.contextmanager
def upgrading(
    engines: Engines, folder: Path, program: Sequence[str] = PREFIX_SERVICE, **environment: str
) -> Iterator[Upgrade]:
    """Yields a fleet in use whose replicas run `program` in `environment`; those that are started later run the working
    tree's in the ordinary one."""
    with running_fleet(engines, folder, environment=environment, program=program) as fleet:
        for name in environment:
            del fleet.environment[name]
        truth = Truth()
        work = UpgradeWork(Upgraded(fleet), truth)
        with work.running():
            yield Upgrade(fleet, truth, work)


def main(
    commit: Annotated[
        str | None, typer.Argument(help="What runs first; by default the newest commit with another service/.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="Seconds of work after each step.")] = 10,
) -> None:
    """Replaces one replica after another under traffic. Exits with status 1 if an answer had wrong bytes, or an
    acknowledged change was lost."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # nothing that was started stays
    old = commit or _newest_other()
    bin_ = binaries() or sys.exit("PostgreSQL is not installed")
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="upgrade-")))
        tree = stack.enter_context(_checked_out(old, folder / "old"))
        postgresql = PostgreSQL(bin_, free_port())
        stack.callback(postgresql.remove)
        seaweedfs = SeaweedFS(free_port)
        stack.callback(seaweedfs.remove)
        engines = Engines.new(postgresql, seaweedfs)
        paths = os.pathsep.join(str(tree / name) for name in ("service", "."))
        upgrade = stack.enter_context(upgrading(engines, folder / "fleet", PYTHONPATH=paths))
        upgrade.observe(f"all run {_git('rev-parse', '--short', old)}", lambda: None, seconds)
        for number in range(len(NAMES)):
            upgrade.replace(number, seconds)
        upgrade.compare()
    console.print(table(upgrade.steps))
    truth = upgrade.truth
    console.print(
        f"{truth.acknowledged} changes acknowledged: {len(truth.lost)} lost; {len(truth.wrong)} wrong answers"
    )
    for contradiction in [*truth.wrong, *truth.lost][:20]:
        console.print(contradiction, highlight=False, soft_wrap=True)
    sys.exit(1 if truth.wrong or truth.lost else 0)


def table(steps: Sequence[Step]) -> Table:
    """Returns the steps within 80 columns."""
    made = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, width=80)
    made.add_column("step", no_wrap=True)
    made.add_column("reads", justify="right")
    made.add_column("writes", justify="right")
    made.add_column("errors by kind", ratio=1)
    for step in steps:
        kinds = ", ".join(f"{kind}: {count}" for kind, count in step.errors.most_common())
        made.add_row(step.name, str(step.reads), str(step.writes), kinds or "none")
    return made


@contextlib.contextmanager
def _checked_out(commit: str, folder: Path) -> Iterator[Path]:
    _git("worktree", "add", "--detach", str(folder), commit)
    try:
        yield folder
    finally:
        _git("worktree", "remove", "--force", str(folder))


def _newest_other() -> str:
    """Returns the newest commit before HEAD, on its first parents, whose service differs from the working tree's."""
    for commit in _git("rev-list", "--first-parent", "HEAD").split():
        if _git("diff", "--name-only", commit, "--", ":(glob)service/prefix_service/**/*.py"):
            return commit
    sys.exit("no commit has another service/: name one")


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(_ROOT), *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


if __name__ == "__main__":
    typer.run(main)
