"""Chaos: `python -m tests.chaos --minutes 10`. Root, or a user who may mount, sees every fault."""

import sys
from collections.abc import Sequence
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from tests.chaos.campaign import Row, campaign
from tests.chaos.faults import FAULTS

console = Console()


def main(
    minutes: Annotated[float, typer.Option(min=0, help="Faults are repeated until so many minutes are over.")] = 10,
    only: Annotated[
        list[str] | None, typer.Option(help="A fault's name, as the table has it; may be repeated.")
    ] = None,
) -> None:
    """Use a service with two workers while one fault after another happens to it. Exit status 1 if an answer had wrong
    bytes, an acknowledged change was lost, work did not go on, or a worker was not replaced in time."""
    names = [fault.name for fault in FAULTS]
    if unknown := set(only or ()) - set(names):
        sys.exit(f"no such fault: {', '.join(sorted(unknown))}; there are: {', '.join(names)}")
    chosen = [fault for fault in FAULTS if not only or fault.name in only]
    with campaign() as running:
        rows = running.run(chosen, minutes * 60, lambda name: console.print(f"{name} …", highlight=False))
        running.finish()
    console.print(table(rows))
    console.print(f"{running.truth.acknowledged} changes acknowledged")
    for contradiction in [*running.truth.wrong, *running.truth.lost][:20]:
        console.print(contradiction, highlight=False, soft_wrap=True)
    failures = [row.failure for row in rows if row.failure]
    for failure in failures:
        console.print(failure, style="red", highlight=False, soft_wrap=True)
    sys.exit(1 if failures or running.truth.wrong or running.truth.lost else 0)


def table(rows: Sequence[Row]) -> Table:
    """Returns the rows, 80 columns wide; times are the longest of each fault, in seconds."""
    made = Table(width=80, padding=(0, 1, 0, 0), box=None, pad_edge=False)
    made.add_column("fault")
    made.add_column("times", justify="right")
    made.add_column("/readyz true", justify="right")
    made.add_column("work goes on", justify="right")
    made.add_column("worker back", justify="right")
    made.add_column("errors", ratio=1)
    made.add_column("wrong", justify="right")
    made.add_column("lost", justify="right")
    for row in rows:
        if row.skipped:
            made.add_row(row.fault.name, "0", "", "", "", f"[red]SKIPPED[/red]: {row.skipped}", "", "")
            continue
        back = "" if row.fault.replaces is None else f"{_seconds(row.replaced)}+{row.start:.1f}"
        errors = ", ".join(f"{count} {kind}" for kind, count in row.errors.most_common())
        ready = _seconds(row.truthful) if row.fault.unready else ""
        counts = (str(row.wrong), str(row.lost))
        made.add_row(row.fault.name, str(row.times), ready, _seconds(row.goes_on), back, errors or "none", *counts)
    return made


def _seconds(value: float | None) -> str:
    return "never" if value is None else f"{value:.1f}"


if __name__ == "__main__":
    typer.run(main)
