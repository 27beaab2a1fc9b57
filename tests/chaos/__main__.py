"""`python -m tests.chaos --minutes 10` lets one fault after another happen to a service in use, and with `--fleet` to
three replicas on PostgreSQL and S3. Root, or a user who may mount, sees every fault.
"""

import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from tests.chaos.campaign import Campaign, Row, campaign
from tests.chaos.faults import FAULTS, Fault, W
from tests.chaos.fleet.campaign import campaign as fleet_campaign
from tests.chaos.fleet.faults import FAULTS as FLEET_FAULTS
from tests.chaos.fleet.work import FleetWork
from tests.chaos.work import Work

console = Console()


def main(
    minutes: Annotated[float, typer.Option(min=0, help="Faults are repeated until so many minutes are over.")] = 10,
    only: Annotated[
        list[str] | None, typer.Option(help="A fault's name, as the table has it; may be repeated.")
    ] = None,
    fleet: Annotated[
        bool, typer.Option("--fleet", help="Three replicas behind HAProxy, on PostgreSQL and SeaweedFS.")
    ] = False,
) -> None:
    """Uses a service with two workers, or a fleet, while one fault after another happens to it.

    Exits with status 1 if an answer had wrong bytes, an acknowledged change was lost, work did not go on, a worker was
    not replaced in time, or a replica refused what it had in memory.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # nothing that was started or mounted stays
    if fleet:
        is_well = _report(*_run(fleet_campaign(), _chosen(FLEET_FAULTS, only), minutes), fleet_table)
    else:
        is_well = _report(*_run(campaign(), _chosen(FAULTS, only), minutes), table)
    sys.exit(0 if is_well else 1)


def _report(rows: Sequence[Row[W]], ended: Campaign[W], table_of: Callable[[Sequence[Row[W]]], Table]) -> bool:
    """Prints what was seen; returns whether nothing went wrong."""
    truth = ended.truth
    console.print(table_of(rows))
    console.print(errors(rows))
    console.print(ended.summary())
    for contradiction in [*truth.wrong, *truth.lost][:20]:
        console.print(contradiction, highlight=False, soft_wrap=True)
    failures = [row.failure for row in rows if row.failure]
    for failure in failures:
        console.print(failure, style="red", highlight=False, soft_wrap=True)
    return not failures and not truth.wrong and not truth.lost


def _chosen(faults: Sequence[Fault[W]], only: list[str] | None) -> list[Fault[W]]:
    names = [fault.name for fault in faults]
    if unknown := set(only or ()) - set(names):
        sys.exit(f"no such fault: {', '.join(sorted(unknown))}; there are: {', '.join(names)}")
    return [fault for fault in faults if not only or fault.name in only]


def _run(
    campaigning: AbstractContextManager[Campaign[W]], faults: Sequence[Fault[W]], minutes: float
) -> tuple[list[Row[W]], Campaign[W]]:
    started = time.monotonic()

    def tell(what: str) -> None:
        console.print(f"{time.monotonic() - started:6.1f} s  {what}", highlight=False)

    with campaigning as running:
        rows = running.run(faults, minutes * 60, tell)
        tell("end in order, start again, compare")
        running.finish()
    return rows, running


def fleet_table(rows: Sequence[Row[FleetWork]]) -> Table:
    """Returns the rows within 80 columns; times are seconds, the longest of each fault."""
    made = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    made.add_column("fault")
    heads = ("times", "no\nread", "no\nwrite", "work\non", "all\nready", "memory\nrefused", "wrong\nbytes", "lost")
    for name in heads:
        made.add_column(name, justify="right")
    for row in rows:
        if row.skipped:
            made.add_row(row.fault.name, "0", *["SKIPPED"] * (len(heads) - 1), style="red")
            continue
        times = (row.reads_paused, row.writes_paused, row.goes_on, row.whole)
        counts = (row.refused, row.wrong, row.lost)
        made.add_row(row.fault.name, str(row.times), *map(_seconds, times), *map(str, counts))
    return made


def table(rows: Sequence[Row[Work]]) -> Table:
    """Returns the rows within 80 columns; times are seconds, the longest of each fault."""
    made = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    made.add_column("fault")
    for name in (
        "times",
        "/readyz\ntells it",
        "work\ngoes on",
        "worker back\n+ its start",
        "wrong\nbytes",
        "changes\nlost",
    ):
        made.add_column(name, justify="right")
    for row in rows:
        if row.skipped:
            made.add_row(row.fault.name, "0", *["SKIPPED"] * 5, style="red")
            continue
        back = "" if row.fault.replaces is None else f"{_seconds(row.replaced)} + {row.start:.1f}"
        ready = _seconds(row.truthful) if row.fault.unready else ""
        made.add_row(row.fault.name, str(row.times), ready, _seconds(row.goes_on), back, str(row.wrong), str(row.lost))
    return made


def errors(rows: Sequence[Row[W]]) -> Table:
    """Returns the errors that callers met, within 80 columns, or why a fault was skipped."""
    made = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, width=80)
    made.add_column("fault", no_wrap=True)
    made.add_column("errors by kind", ratio=1)
    for row in rows:
        kinds = ", ".join(f"{kind}: {count}" for kind, count in row.errors.most_common())
        made.add_row(row.fault.name, f"SKIPPED, {row.skipped}" if row.skipped else kinds or "none")
    return made


def _seconds(value: float | None) -> str:
    return "never" if value is None else f"{value:.1f}"


if __name__ == "__main__":
    typer.run(main)
