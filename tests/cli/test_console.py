"""`cli.console` fits tables to terminals of every width and to pipes, and says what a command waits for."""

import os
import subprocess
import sys

import pytest

from tests.cli.conftest import on_terminal

ID = "0123456789abcdef"
DIGEST = "sha256:" + "5" * 64
_BEGIN = "from prefix_service.cli.console import *\n"
_TABLE = f"""
print_table("Keys", ["id", "name", "created", "bytes", "uses"], [
    ["{ID}", "the key of the nightly training run", "2026-11-26 04:07:15", "12.5 MiB of 1.0 GiB", 7],
    ["{ID[::-1]}", "x", "2026-11-26 04:07:16", None, 12345],
])
"""
_FIELDS = f"""
print_fields("acme/a", {{"digest": "{DIGEST}", "config": "a text of many words " * 6, "version": 7}})
"""


def shown(columns: int, code: str) -> list[str]:
    """Returns the lines that code shows on a terminal."""
    status, text = on_terminal(columns, [sys.executable, "-c", _BEGIN + code])
    assert status == 0, text
    return text.splitlines()


def piped(code: str, columns: str = "40") -> list[str]:
    """Returns the lines that code writes into a pipe, whatever COLUMNS says."""
    command = [sys.executable, "-c", _BEGIN + code]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, "COLUMNS": columns})
    return done.stdout.splitlines()


def test_a_pipe_gets_one_line_for_each_row() -> None:
    """In a pipe no row is wrapped or cropped, so that `grep` and `awk` find it; numbers are right-aligned."""
    assert piped(_TABLE) == [
        "Keys",
        "id                name                                 created              bytes                 uses",
        "----------------  -----------------------------------  -------------------  -------------------  -----",
        f"{ID}  the key of the nightly training run  2026-11-26 04:07:15  12.5 MiB of 1.0 GiB      7",
        f"{ID[::-1]}  x                                    2026-11-26 04:07:16                       12345",
    ]
    assert piped(_FIELDS)[1] == f"digest   {DIGEST}"


def test_a_wide_terminal_shows_what_a_pipe_gets() -> None:
    """A terminal with enough columns shows the table of a pipe."""
    assert shown(120, _TABLE) == piped(_TABLE)


def test_a_terminal_of_80_columns_folds_between_words() -> None:
    """80 columns fold sentences first; ids, numbers and numbers with their units stay whole."""
    lines = shown(80, _TABLE)
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    for whole in (ID, ID[::-1], "2026-11-26 04:07:15", "12.5 MiB of 1.0 GiB", "12345"):
        assert whole in text
    assert len(lines) == 3 + 3 + 1


@pytest.mark.parametrize("columns", [20, 30, 45])
def test_a_narrow_terminal_shows_a_block_for_each_row(columns: int) -> None:
    """A narrow terminal shows a line for each column of a row, and only the terminal breaks long ones."""
    lines = shown(columns, _TABLE)
    assert lines[0] == "Keys"
    assert [line.split()[0] for line in lines if line.startswith(("id", "uses"))] == ["id", "uses"] * 2
    assert sum(ID in line or ID[::-1] in line for line in lines) == 2


def test_fields_on_80_columns() -> None:
    """A text is folded next to its name; a word that does not fit there is below it, whole."""
    assert shown(80, _FIELDS)[1] == f"digest   {DIGEST}"
    lines = shown(79, _FIELDS)
    assert lines[1:3] == ["digest", f"  {DIGEST}"]
    assert max(map(len, lines)) <= 79
    assert lines[3].startswith("config   a text of")
    assert lines[4].startswith("         ")
    assert lines[-1] == "version  7"


def test_a_head_is_folded_as_its_column_is() -> None:
    """A column's head is folded with its column, and stays above its cells."""
    rows = '[["2026-11-26 04:07:15", "a-name-of-thirty-characters-00", 123456]]'
    lines = shown(50, f'print_table("t", ["created (UTC)", "name", "prefix tokens"], {rows})')
    assert lines[1:] == [
        "created     name                            prefix",
        "(UTC)                                       tokens",
        "----------  ------------------------------  ------",
        "2026-11-26  a-name-of-thirty-characters-00  123456",
        "04:07:15",
    ]


def test_a_sentence_is_folded_between_words() -> None:
    """A terminal folds a sentence between words; a pipe does not, and neither folds a command to copy."""
    sentence = "a sentence of some words (request 0123456789abcdef)"
    code = f"say({sentence!r})\nsay('  export PREFIX_URL=http://127.0.0.1:8080')"
    copied = "  export PREFIX_URL=http://127.0.0.1:8080"
    assert shown(40, code) == ["a sentence of some words (request", "0123456789abcdef)", copied]
    assert piped(code) == [sentence, copied]


def test_wide_characters_take_two_columns() -> None:
    """Columns are aligned in every script."""
    lines = piped('print_table("t", ["a", "b"], [["\u65e5\u672c", "x"], ["abcd", "y"]])')
    assert lines[3:] == ["\u65e5\u672c  x", "abcd  y"]


def test_an_empty_table_has_its_head() -> None:
    """An empty table prints its title and head, and nothing else."""
    assert piped('print_table("Keys", ["id", "name"], [])') == ["Keys", "id  name", "--  ----"]


def test_who_waits_sees_for_whom() -> None:
    """A terminal shows what the command waits for after two seconds of waiting; a pipe does not."""
    wait = "[each.join() for each in threading.enumerate() if isinstance(each, threading.Timer)]"
    code = f"import threading\nwith waiting_for('http://a:8080'):\n    {{}}\n{wait}"
    # The command that does not wait has a minute for it: a slow machine may take two seconds.
    patient = "import prefix_service.cli.console\nprefix_service.cli.console._SILENCE = 60\n"
    assert shown(80, patient + code.format("pass")) == []
    assert shown(80, code.format(wait)) == ["waiting for http://a:8080 …"]
    command = [sys.executable, "-c", _BEGIN + code.format(wait)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("", "")
