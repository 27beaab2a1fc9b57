"""Attack a service with the smallest keys, beside a neighbour that reads and moves an alias: `python -m tests.attack`.

About 20 minutes for all attacks. Exit status 1 if a promise did not hold.
"""

import contextlib
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from tests.attack.attacks import ATTACKS
from tests.attack.trial import Stage, Verdict, judged, staged

console = Console()


def main(
    only: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(ATTACKS)}; repeatable.")] = None,
    seconds: Annotated[float, typer.Option(min=1, help="Of each attack, and of the neighbour alone before it.")] = 5,
    rounds: Annotated[
        int,
        typer.Option(
            min=1,
            help="Of each attack, and as many again if its times do not hold. Their median counts, "
            "without rounds in which the machine itself stalled.",
        ),
    ] = 3,
    parser: Annotated[str, typer.Option(help="httptools or h11.")] = "httptools",
) -> None:
    """Attack, and show what the service, its neighbour and the attacker saw."""
    verdicts: list[Verdict] = []
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        stage: Stage | None = None
        for name in only or ATTACKS:
            if stage is None:
                place = Path(folder) / str(len(verdicts))
                stage = stack.enter_context(staged(place, console.print, PREFIX_HTTP_PARSER=parser))
            console.print(f"[bold]{name}[/]: {ATTACKS[name].says}")
            verdicts.append(judged(stage, ATTACKS[name], seconds, rounds))
            _show(verdicts[-1])
            if verdicts[-1].has_ended_service:
                stack.close()
                stage = None
    console.print(_table(verdicts))
    sys.exit(any(verdict.broken or verdict.slow() for verdict in verdicts))


def _show(verdict: Verdict) -> None:
    answers = ", ".join(f"{status}: {count}" for status, count in verdict.answers.items())
    console.print(f"  answered {answers or 'nothing'}")
    if stalled := len(verdict.rounds) - len(verdict.undisturbed):
        console.print(f"  the machine stalled in {stalled} of {len(verdict.rounds)} rounds")
    for reason in verdict.broken + verdict.slow():
        console.print(f"  [red]{reason}[/]")


def _table(verdicts: list[Verdict]) -> Table:
    """Times in milliseconds, medians of the rounds."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("attack", "key", "MiB", "silent", "warm p50", "warm p99", "cold p99", "move p99", "held"):
        table.add_column(name, no_wrap=True, justify="left" if name in ("attack", "key") else "right")
    for verdict in verdicts:
        cells = [verdict.attack.name, verdict.attack.key, str(verdict.memory >> 20), f"{verdict.silence * 1000:.0f}"]
        cells += [
            _beside_alone(verdict, *which) for which in (("warm", 0.5), ("warm", 0.99), ("cold", 0.99), ("move", 0.99))
        ]
        table.add_row(*cells, "no" if verdict.broken or verdict.slow() else "yes")
    table.caption = "milliseconds; the neighbour's latencies beside the attack/alone"
    return table


def _beside_alone(verdict: Verdict, kind: str, share: float) -> str:
    return "/".join(f"{seconds * 1000:.0f}" for seconds in verdict.latency(kind, share))


if __name__ == "__main__":
    typer.run(main)
