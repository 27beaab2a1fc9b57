"""`python -m tests.soak` does everything that callers do for ten minutes, and measures whether the service grows.

Exits with status 1 if memory, descriptors or threads grow, or a step failed that should not.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from tests.conftest import Server, running_server
from tests.processes import eventually
from tests.soak.churn import Churn
from tests.soak.flat import line

console = Console()
_MIB = 1 << 20
_BUDGETS = {
    "PREFIX_DEVICE_BYTES": str(12 * _MIB),
    "PREFIX_RENDERING_BYTES": str(12 * _MIB),
    "PREFIX_GARBAGE_GRACE": "5",
}
# The tolerated growth of each in a minute: an allocator's fragments, not a leak of a request's objects.
TOLERATED = {"memory": 1.0, "descriptors": 0.5, "threads": 0.5}


@dataclass
class Samples:
    """MiB of memory, open descriptors and threads of a process, and the times of the samples."""

    times: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)
    descriptors: list[float] = field(default_factory=list)
    threads: list[float] = field(default_factory=list)

    def take(self, server: Server) -> None:
        """Takes one sample of each."""
        process = Path(f"/proc/{server.process.pid}")
        status = (process / "status").read_text()
        self.times.append(time.monotonic())
        self.memory.append(int(status.partition("RssAnon:")[2].split()[0]) / 1024)
        self.threads.append(int(status.partition("Threads:")[2].split()[0]))
        self.descriptors.append(len(list((process / "fd").iterdir())))


def soaked(folder: Path, minutes: float, progress: Callable[[float], None]) -> tuple[Samples, Churn]:
    """Lets a service soak for so long once every step was done, and returns samples, which begin after a fifth of the
    time, when every cache is full."""
    with running_server(folder / "data", environment=_BUDGETS) as server:
        churn, samples = Churn(server), Samples()
        churn.start()
        try:
            eventually(churn.has_begun, 180)
            began, length = time.monotonic(), 60 * minutes
            while (passed := time.monotonic() - began) < length:
                if passed > length / 5:
                    samples.take(server)
                progress(passed / length)
                time.sleep(min(1.0, length / 100))
        finally:
            churn.stop()
    return samples, churn


def main(minutes: Annotated[float, typer.Option(min=0.1, help="How long.")] = 10) -> None:
    """Soaks a service, and shows what grew."""
    with tempfile.TemporaryDirectory() as folder, Progress(console=console) as bar:
        task = bar.add_task("soaking", total=1.0)
        samples, churn = soaked(Path(folder), minutes, lambda part: bar.update(task, completed=part))
    table = Table("of the service", "mean", "growth in a minute", "± 2 errors", "tolerated", "")
    grows = False
    for name, tolerated in TOLERATED.items():
        found = line(samples.times, getattr(samples, name))
        grows |= (this := found.grows(tolerated / 60))
        cells = (f"{found.mean:.1f}", f"{60 * found.slope:+.3f}", f"{120 * found.error:.3f}", f"{tolerated:g}")
        table.add_row(f"{name} (MiB)" if name == "memory" else name, *cells, "grows" if this else "flat")
    console.print(table)
    console.print("done: " + ", ".join(f"{count} {name}" for name, count in sorted(churn.done.items())))
    wrong = churn.unexpected + churn.held_up
    for reason, count in wrong.most_common(20):
        console.print(f"[red]{count} times {reason}[/]")
    sys.exit(grows or bool(wrong))


if __name__ == "__main__":
    typer.run(main)
