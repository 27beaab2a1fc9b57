"""`python -m tests.fuzz` fuzzes the service and its client. Exits with status 1 if something undocumented was found.

`wire` sends mutated requests to both parsers, `files` uploads mutated weights, configs and pickles, `answers` lets the
client read a hostile server's answers, `schema` runs schemathesis with all checks, with and without a key.
"""

import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from tests.fuzz import answers, files, requests, schema
from tests.fuzz.watch import Findings

console = Console()
KINDS = ("wire", "files", "answers", "schema")


def main(
    only: Annotated[list[str] | None, typer.Option(help="wire, files, answers or schema; repeatable.")] = None,
    minutes: Annotated[float, typer.Option(min=0.01, help="Of each kind but schema.")] = 2,
    examples: Annotated[int, typer.Option(min=1, help="Of each operation and phase, for schema.")] = 50,
    seed: Annotated[int, typer.Option(help="Other seeds find other things.")] = 1,
) -> None:
    """Fuzzes, and shows the answers' statuses and the faults."""
    if unknown := set(only or ()) - set(KINDS):
        raise typer.BadParameter(f"{', '.join(unknown)}: choose from {', '.join(KINDS)}")
    is_sound = True
    with tempfile.TemporaryDirectory() as place:
        for kind in only or KINDS:
            folder = Path(place) / kind
            folder.mkdir()
            if kind == "schema":
                is_sound &= _schema(folder, examples, seed)
            elif kind == "wire":
                is_sound &= _shown("wire, httptools", requests.fuzzed(folder, 30 * minutes, seed, "httptools"))
                is_sound &= _shown("wire, h11", requests.fuzzed(folder, 30 * minutes, seed, "h11"))
            elif kind == "files":
                is_sound &= _shown(kind, files.fuzzed(folder, 60 * minutes, seed))
            else:
                is_sound &= _shown(kind, answers.fuzzed(60 * minutes, seed))
    sys.exit(not is_sound)


def _shown(title: str, findings: Findings) -> bool:
    counted = ", ".join(f"{status}: {count}" for status, count in sorted(findings.statuses.items()))
    console.print(f"[bold]{title}[/]: {sum(findings.statuses.values())} tried; {counted}", highlight=False)
    for fault, example in findings.faults.items():
        console.print(f"{fault}\n  {example[:2000]!r}", style="red", markup=False)
    return not findings.faults


def _schema(folder: Path, examples: int, seed: int) -> bool:
    is_sound = True
    for with_key in (True, False):
        (here := folder / str(with_key)).mkdir()
        report = schema.fuzzed(here, examples, seed, with_key=with_key)
        last = report.text.strip().splitlines()[-1].strip("= ")
        console.print(f"[bold]schema, {'with' if with_key else 'without'} a key[/]: {last}", highlight=False)
        if report.status or "Traceback" in report.log:
            console.print(report.text[-8000:], markup=False)
            is_sound = False
    return is_sound


if __name__ == "__main__":
    typer.run(main)
