"""How the command line speaks: tables for people, JSON where something may read it."""

import json
import sys
from collections.abc import Callable
from typing import Any, Final

from rich import box
from rich.console import Console
from rich.status import Status
from rich.table import Table
from rich.text import Text

from prefix_service.system.printable import printable, printable_lines

console = Console()
errors_console = Console(stderr=True)

_WORD: Final = 20  # characters of what is not broken: a name, an action, a key's id


def print_json(value: Any) -> None:
    """Write one JSON document to standard output."""
    sys.stdout.write(printable_lines(json.dumps(value, indent=2, ensure_ascii=False)) + "\n")


def print_table(title: str, columns: list[str], rows: list[list[object]]) -> None:
    """A table; numbers stand to the right, and where it is too wide long cells are folded, not short words."""
    table = Table(title=Text(printable(title)), title_justify="left", box=box.SIMPLE_HEAD)
    cells = [["" if cell is None else printable(str(cell)) for cell in row] for row in rows]
    for index, column in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[index], int | float) for row in rows)
        words = all(len(row[index]) <= _WORD and " " not in row[index] for row in cells)
        table.add_column(
            Text(printable(column)), justify="right" if numeric else "left", overflow="fold", no_wrap=words
        )
    for row in cells:
        table.add_row(*map(Text, row))
    console.print(table)


def say(line: str) -> None:
    """Write one line to standard output, never wrapped."""
    console.print(printable(line), markup=False, highlight=False, soft_wrap=True)


def note(line: str) -> None:
    """Write one line to standard error, never wrapped."""
    errors_console.print(printable(line), markup=False, highlight=False, soft_wrap=True)


def complain(line: str) -> None:
    """Write one line in red to standard error, never wrapped."""
    errors_console.print(printable(line), style="red", markup=False, highlight=False, soft_wrap=True)


def working(what: str) -> Status:
    """A sign on a terminal that something is under way, while the block runs."""
    return errors_console.status(Text(printable(what)))


def human_bytes(count: float) -> str:
    """Bytes in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def human_time(moment: str) -> str:
    """A moment as the service sends it, in UTC; a narrow table breaks it at the blank."""
    return moment.removesuffix("Z").replace("T", " ")


def used_of(used: int, budget: int | None, shown: Callable[[int], str] = str) -> str:
    """What is used, beside its budget if it has one."""
    return shown(used) if budget is None else f"{shown(used)} of {shown(budget)}"
