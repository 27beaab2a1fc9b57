"""The rows of the table that `bash tests/gpu/run` prints."""

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from tests.benchmarks.tables import Grid

PASSED: Final = "passed"
FAILED: Final = "FAILED"
NOT_RUN: Final = "NOT RUN"
_END: Final = 400  # characters of an error in a row


@dataclass(frozen=True, slots=True)
class Row:
    """What became of one check or measurement, and its figures or the reason."""

    part: str
    what: str
    result: Literal["passed", "FAILED", "NOT RUN"]
    told: str = ""


def attempt(part: str, what: str, check: Callable[[], str]) -> Row:
    """Runs a check, which returns its figures; if it raises, the row has the error, and the next check is run."""
    try:
        return Row(part, what, PASSED, check())
    except Exception as error:  # noqa: BLE001 - the others are run too
        return failed(part, what, error)


def failed(part: str, what: str, error: Exception) -> Row:
    """Prints an error in full on stderr; returns a row with its end, where an error with vLLM's log has the reason."""
    traceback.print_exception(error)
    told = str(error).replace("\n", " ")
    return Row(part, what, FAILED, f"{type(error).__name__}: {told if len(told) <= _END else f'…{told[-_END:]}'}")


def table(title: str, rows: Sequence[Row]) -> Grid:
    """Returns all rows as one table."""
    return Grid(
        title, ["part", "what", "result", "figures"], [[row.part, row.what, row.result, row.told] for row in rows]
    )
