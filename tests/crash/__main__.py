"""Kills a service at every write, and fails every write: `python -m tests.crash --kills 2000`."""

import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from tests.crash.campaign import ERRORS, campaign
from tests.crash.strace import why_not
from tests.crash.trial import KILL, Verdict

_FOUND = ("whole", "absent", "wrong")
console = Console()


def main(
    kills: Annotated[int, typer.Option(min=0, help="Kills, spread over every point of every change.")] = 2000,
    failures: Annotated[int, typer.Option(min=0, help="Calls that fail, likewise.")] = 0,
) -> None:
    """Interrupts every change of a data folder at its writes, and reports what a restarted service finds."""
    if (reason := why_not()) is not None:
        sys.exit(reason)
    with tempfile.TemporaryDirectory() as place, campaign(Path(place)) as trials:
        points = trials.points(KILL, wanted=kills)
        points += trials.points(*ERRORS, wanted=failures)
        verdicts = list(track(trials.tried(points), "Interrupting", len(points), console=console))
    console.print(_table(verdicts))
    wrong = [verdict for verdict in verdicts if verdict.found == "wrong"]
    for verdict in wrong[:20]:
        point = verdict.point
        console.print(f"{point.base.operation}, {point.call} {point.nth}, {point.fault}:\n{verdict.reason}")
    sys.exit(1 if wrong else 0)


def _table(verdicts: Sequence[Verdict]) -> Table:
    table = Table("change", "call", "fault", *_FOUND)
    counts: dict[tuple[str, str, str], Counter[str]] = {}
    for verdict in verdicts:
        point = verdict.point
        counts.setdefault((point.base.operation, point.call, point.fault), Counter())[verdict.found] += 1
    for names, found in sorted(counts.items()):
        table.add_row(*names, *(str(found[name]) for name in _FOUND))
    total = Counter(verdict.found for verdict in verdicts)
    table.add_section()
    table.add_row(f"{len(verdicts)} in all", "", "", *(str(total[name]) for name in _FOUND))
    return table


if __name__ == "__main__":
    typer.run(main)
