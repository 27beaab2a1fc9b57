"""Output of the command line: tables for people, JSON for programs."""

import contextlib
import json
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

from rich.cells import cell_len
from rich.console import Console
from rich.status import Status
from rich.text import Text

from prefix_service.errors import PrefixServiceError
from prefix_service.system.printable import printable, printable_lines

console = Console()
errors_console = Console(stderr=True)

_GAP: Final = 2  # blanks between two columns
_FEW_WORDS: Final = 4  # of a moment, a size beside its budget, a name
_SILENCE: Final = 2.0  # seconds that a command may wait before it says for whom
_WORD: Final = re.compile(r"[\d.]+ (?:[KMGT]iB|B|ms|s)\b(?:/s)?|\S+")
"""What no table breaks: a run of characters without blanks, and a number with its unit."""


def print_json(value: Any) -> None:
    """Write one JSON document to standard output."""
    sys.stdout.write(printable_lines(json.dumps(value, indent=2, ensure_ascii=False)) + "\n")


def print_error(code: str, detail: str, request_id: str | None = None) -> None:
    """Write an error as a JSON document to standard output: `{"error": {"code", "detail", "request_id"}}`."""
    print_json({"error": {"code": code, "detail": detail, "request_id": request_id}})


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table; each row has one cell for each of `columns`. Numbers stand to the right.

    No cell is cropped, and no word or number is broken. Where the output is no terminal, each row is one line. On a
    terminal that is too narrow, cells are folded between words; if that is not enough, each row becomes a block of
    lines, one for each column.
    """
    names, cells = [printable(column) for column in columns], [[_shown(cell) for cell in row] for row in rows]
    _print_line(printable(title), "bold")
    widths = _widths(names, cells)
    if widths is None:
        for row in cells:
            _print_line()
            _print_fields(names, row)
        return
    numeric = [bool(rows) and all(isinstance(row[index], int | float) for row in rows) for index in range(len(names))]
    _print_row(names, widths, numeric, "bold")
    _print_line((" " * _GAP).join("-" * width for width in widths), "dim")
    for row in cells:
        _print_row(row, widths, numeric)


def _print_row(cells: Sequence[str], widths: list[int], numeric: list[bool], style: str = "") -> None:
    folded = [_folded(cell, width) for cell, width in zip(cells, widths, strict=True)]
    for index in range(max(map(len, folded))):
        line = [lines[index] if index < len(lines) else "" for lines in folded]
        _print_line(_joined(line, widths, numeric), style)


def print_fields(title: str, fields: Mapping[str, object]) -> None:
    """Print the properties of one thing, one below the other, as whole as `print_table` does."""
    _print_line(printable(title), "bold")
    _print_fields([printable(name) for name in fields], [_shown(value) for value in fields.values()])


def _print_fields(names: list[str], values: list[str]) -> None:
    margin = max(map(cell_len, names), default=0) + _GAP
    for name, value in zip(names, values, strict=True):
        start, room = name + " " * (margin - cell_len(name)), console.width - margin
        if not console.is_terminal or cell_len(value) <= room:
            _print_line(start + value)
        elif _longest_word(value) <= room:
            first, *others = _folded(value, room)
            _print_line(start + first)
            for line in others:
                _print_line(" " * margin + line)
        else:  # the terminal may break it, so that what is copied stays whole
            _print_line(name)
            for line in _folded(value, console.width - _GAP):
                _print_line(" " * _GAP + line)


def _shown(cell: object) -> str:
    return "" if cell is None else printable(str(cell))


def _widths(names: list[str], cells: list[list[str]]) -> list[int] | None:
    """Returns the width of each column; None if the terminal is too narrow for the longest words.

    Sentences are folded first, each to about as many lines as the others; moments, sizes and names only if that is not
    enough.
    """
    columns = list(zip(names, *cells, strict=True))
    widths = [max(map(cell_len, column)) for column in columns]
    if not console.is_terminal:
        return widths
    least = [max(map(_longest_word, column)) for column in columns]
    words = [max(len(_WORD.findall(cell)) for cell in column) for column in columns]
    natural, room = list(widths), console.width - _GAP * (len(columns) - 1)
    if sum(least) > room:
        return None
    while sum(widths) > room:
        foldable = [index for index, width in enumerate(widths) if width > least[index]]
        sentences = [index for index in foldable if words[index] > _FEW_WORDS] or foldable
        lines = {index: natural[index] / (widths[index] - 1) for index in sentences}
        widths[min(lines, key=lines.__getitem__)] -= 1
    return widths


def _longest_word(text: str) -> int:
    return max(map(cell_len, _WORD.findall(text)), default=0)


def _folded(text: str, width: int) -> list[str]:
    """Returns a text in lines of at most `width`, longer only for a word that is."""
    if cell_len(text) <= width:
        return [text]
    lines = [""]
    for word in _WORD.findall(text):
        longer = f"{lines[-1]} {word}" if lines[-1] else word
        if lines[-1] and cell_len(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _joined(cells: list[str], widths: list[int], numeric: list[bool]) -> str:
    padded = []
    for cell, width, is_number in zip(cells, widths, numeric, strict=True):
        blanks = " " * (width - cell_len(cell))
        padded.append(blanks + cell if is_number else cell + blanks)
    return (" " * _GAP).join(padded).rstrip()


def _print_line(line: str = "", style: str = "") -> None:
    console.print(Text(line, style=style), soft_wrap=True)


def say(line: str = "") -> None:
    """Write a sentence to standard output."""
    _print_sentence(console, line)


def _print_sentence(to: Console, line: str, style: str = "") -> None:
    """Print a line; a terminal that is narrower gets it folded between words. What is indented is meant to be copied,
    and stays one line."""
    text = printable(line)
    fits = not to.is_terminal or text.startswith(" ")
    for part in [text] if fits else _folded(text, to.width):
        to.print(Text(part, style=style), soft_wrap=True)


def error_line(error: PrefixServiceError) -> str:
    """Returns an error as one line: its code, what was wrong, and the id of its request if there was one."""
    request = "" if error.request_id is None else f" (request {error.request_id})"
    return f"error ({error.code}): {error}{request}"


def report(line: str, document: Mapping[str, Any], *, as_json: bool) -> None:
    """Write what was done to standard output: one line for people, or the JSON document."""
    if as_json:
        print_json(document)
    else:
        say(line)


def say_lines(text: str) -> None:
    """Write the lines of a text to standard output, never wrapped."""
    lines = printable_lines(text.replace("\r\n", "\n").expandtabs())
    console.print(lines, markup=False, highlight=False, soft_wrap=True)


def note(line: str) -> None:
    """Write a sentence to standard error."""
    _print_sentence(errors_console, line)


def complain(line: str) -> None:
    """Write a sentence in red to standard error."""
    _print_sentence(errors_console, line, "red")


def working(what: str) -> Status:
    """A sign on a terminal that something is under way, while the block runs."""
    return errors_console.status(Text(printable(what)))


@contextlib.contextmanager
def waiting_for(whom: str) -> Iterator[None]:
    """Tell a person, on a terminal, for whom the command waits if the block takes longer than two seconds."""
    if not errors_console.is_terminal:
        yield
        return
    timer = threading.Timer(_SILENCE, note, (f"waiting for {whom} …",))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def human_time(moment: str) -> str:
    """A moment as the service sends it, in UTC and whole seconds; a narrow table breaks it at the blank."""
    return moment.removesuffix("Z").partition(".")[0].replace("T", " ")


def used_of(used: int, budget: int | None, shown: Callable[[int], str] = str) -> str:
    """Returns the used amount as text, with its budget if there is one."""
    return shown(used) if budget is None else f"{shown(used)} of {shown(budget)}"
