"""Runs rounds in turns, computes ratios with their spread, and holds what a part hands to the page."""

import os
import platform
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Final, Literal, Self

from rich.console import Console

from tests.benchmarks.tables import Grid

progress: Final = Console(stderr=True)

QUIET: Final = {"PREFIX_LOG_LEVEL": "warning"}
"""Peers log no requests, so ours does not either where it is compared."""


@dataclass(frozen=True, slots=True)
class Spread:
    """A median between its quartiles."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Self:
        """Returns the spread of values, one of each round."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        return cls(*statistics.quantiles(values, n=4, method="inclusive"))

    def __str__(self) -> str:
        digits = 0 if self.median >= 20 else 2
        low, median, high = (f"{value:,.{digits}f}" for value in (self.low, self.median, self.high))
        return f"{median} ({low} to {high})"


def in_turns(cases: Mapping[str, Callable[[], float]], rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Returns each case's results, round by round: A B C, B C A, …, so that a drift meets all alike."""
    found: dict[str, list[float]] = {name: [] for name in cases}
    names = list(cases)
    for number in range(-warm_up, rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            value = cases[name]()
            if number >= 0:
                found[name].append(value)
    return found


def against_control(
    mine: Callable[[], float], other: Callable[[], float], control: Callable[[], float], rounds: int
) -> tuple[Spread, Spread]:
    """Returns the ratios of paired rounds of `mine` to `other`, and of `control`, which does what `other` does, to it.

    Every other round runs backwards, so that none always follows the same other one. How far the second ratio is from
    1 is what this machine can tell apart.
    """
    found: dict[Callable[[], float], list[float]] = {mine: [], other: [], control: []}
    for number in range(-2, rounds):
        for case in list(found)[:: 1 if number % 2 else -1]:
            value = case()
            if number >= 0:
                found[case].append(value)
    return ratio(found[mine], found[other]), ratio(found[control], found[other])


def ratio(values: list[float], to: list[float]) -> Spread:
    """Returns the ratio of paired rounds."""
    return Spread.of([one / other for one, other in zip(values, to, strict=True)])


@dataclass(frozen=True, slots=True)
class Chart:
    """A plot: bars of each series over the names in `x`, or lines over the numbers in `x`; None is a gap."""

    kind: Literal["bars", "lines"]
    title: str
    y_label: str
    x: list[str]
    series: dict[str, list[float | None]]
    x_label: str = ""
    log_y: bool = True


@dataclass(frozen=True, slots=True)
class Outcome:
    """The findings of a part."""

    grids: list[Grid]
    chart: Chart
    machine: str = field(default_factory=lambda: machine())


def machine() -> str:
    """Returns a description of the machine and its packages."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("uvicorn", "uvloop", "httptools", "torch"))
    return f"{len(os.sched_getaffinity(0))} cores, {platform.system()}, Python {platform.python_version()}, {packages}"


def say(line: str) -> None:
    """Prints progress on standard error."""
    progress.print(line, markup=False, highlight=False)


def warn_missing(what: str, package: str) -> None:
    """Warns loudly that a peer is left out because it is not installed."""
    sys.stderr.write(f"LEFT OUT: {what} is not installed (Debian package {package})\n")
