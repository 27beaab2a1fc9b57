"""Compares the client with PEFT on each of transformers' architectures: `python -m tests.sweep`."""

import json
import logging
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import transformers
import typer
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from tests.conftest import running_server
from tests.sweep.expected import expected_outcomes
from tests.sweep.names import Architecture, architectures
from tests.sweep.publishing import publishing
from tests.sweep.verdict import NOT_BUILT, PEFT_FAILS, SIDES, TOLERANCE, Fetch, Verdict, try_out

console = Console(stderr=True)


def main(
    only: Annotated[
        list[str] | None, typer.Option(help="A name, `decoder/llama`, or a model type; repeatable.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Compares logits and greedy tokens behind a prefix with PEFT's, for padded rows and for each row alone."""
    transformers.logging.set_verbosity(logging.ERROR)
    chosen = [each for each in architectures().values() if not only or {each.name, each.model_type} & set(only)]
    if not chosen:
        sys.exit(f"no architecture has one of these names: {', '.join(only or [])}")
    with tempfile.TemporaryDirectory() as place, _server(Path(place)) as fetch:
        tried = (try_out(each, fetch, Path(place) / "adapters" / each.name) for each in chosen)
        verdicts = list(track(tried, "Comparing", len(chosen), console=console))
    expected = expected_outcomes()
    surprises = [each for each in verdicts if not expected[each.architecture.name].is_met_by(each)]
    if as_json:
        sys.stdout.write(json.dumps([_as_json(each) for each in verdicts], indent=1) + "\n")
    else:
        Console().print(_table(verdicts, surprises))
    for each in surprises:
        wanted = expected[each.architecture.name].outcome
        console.print(f"{each.architecture.name}: {each.outcome} {each.reason}, expected: {wanted}", each.errors)
    sys.exit(1 if surprises else 0)


@contextmanager
def _server(place: Path) -> Iterator[Fetch]:
    with running_server(place / "data") as server, publishing(server) as fetch:
        yield fetch


def _as_json(verdict: Verdict) -> dict[str, Any]:
    return {"name": verdict.architecture.name, **asdict(verdict)}


def _table(verdicts: Sequence[Verdict], surprises: Sequence[Verdict]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.caption = f"left and right; = within {TOLERANCE:.0e} of the largest logit, or the same tokens"
    for name in ("", "architecture", "rows", "PEFT", "tokens", "largest", "outcome"):
        table.add_column(name, overflow="fold")
    for verdict in verdicts:
        table.add_row(*_cells(verdict), style="red" if verdict in surprises else None)
    table.add_section()
    counts = Counter(verdict.outcome for verdict in verdicts)
    compared = len(verdicts) - counts[NOT_BUILT] - counts[PEFT_FAILS]
    table.add_row("", f"{len(verdicts)} in all", "", "", "", "", f"{compared} compared, {counts['equal']} equal")
    return table


def _cells(verdict: Verdict) -> list[str]:
    marks = [
        " ".join("-" if side not in found else _mark(found[side]) for side in SIDES[1:])
        for found in (verdict.rows, verdict.peft, verdict.tokens)
    ]
    largest = f"{verdict.largest:.0e}" if verdict.rows else ""
    return [_kind(verdict.architecture), verdict.architecture.label, *marks, largest, verdict.outcome]


def _mark(found: float | bool) -> str:
    return "=" if (found if isinstance(found, bool) else found < TOLERANCE) else "≠"


def _kind(architecture: Architecture) -> str:
    return {"decoder": "dec", "encoder-decoder": "enc", "vision": "vis"}[architecture.kind]


if __name__ == "__main__":
    typer.run(main)
