"""Spreads many interruptions over every point of every change, and over all processors."""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Final, ParamSpec, TypeVar

import torch

from tests.crash.folder import quiet
from tests.crash.operations import CASES, OPERATIONS
from tests.crash.trial import Base, Point, Verdict, base_of, points_of, tried

P = ParamSpec("P")
T = TypeVar("T")

ERRORS: Final = ("error=ENOSPC", "error=EIO", "error=EDQUOT")


def ready() -> None:
    """Prepares a process for forking: it has one thread, and logs nothing."""
    torch.set_num_threads(1)
    quiet()


class Campaign:
    """Runs trials in processes of their own, each with everything imported before it forks."""

    def __init__(self, pool: ProcessPoolExecutor, place: Path) -> None:
        self._pool, self._place = pool, place
        self._bases: dict[int, list[Base]] = {}

    def points(self, *faults: str, wanted: int) -> list[Point]:
        """Returns so many points at which these faults can happen, or a few more. If there are too few, the changes are
        repeated with other content; if there are too many, they are chosen evenly from each kind of call of each
        change.
        """
        found: list[Point] = []
        for number in count():
            found += [point for base in self._pass(number) for fault in faults for point in points_of(base, fault)]
            if len(found) >= wanted:
                return _spread(found, wanted)
        raise AssertionError("count() has no end")

    def _pass(self, number: int) -> list[Base]:
        case = CASES[number % len(CASES)]
        if number not in self._bases:
            folders = [self._place / f"{number} {name}" for name in OPERATIONS]
            self._bases[number] = list(self._pool.map(base_of, OPERATIONS, [case] * len(folders), folders))
        return self._bases[number]

    def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Returns the result of a function, called in a process that can fork."""
        return self._pool.submit(function, *args, **kwargs).result()

    def tried(self, points: Sequence[Point]) -> Iterator[Verdict]:
        """Yields the verdicts as they come."""
        for done in as_completed([self._pool.submit(tried, point) for point in points]):
            yield done.result()


def _spread(points: Sequence[Point], wanted: int) -> list[Point]:
    kinds: dict[tuple[str, str, str], list[Point]] = {}
    for point in points:
        kinds.setdefault((point.base.operation, point.call, point.fault), []).append(point)
    share = next(share for share in count() if sum(min(share, len(kind)) for kind in kinds.values()) >= wanted)
    return [
        kind[index * len(kind) // min(share, len(kind))]
        for kind in kinds.values()
        for index in range(min(share, len(kind)))
    ]


@contextmanager
def campaign(place: Path) -> Iterator[Campaign]:
    """Yields a campaign whose folders are made in `place`."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=spawn, initializer=ready) as pool:
        yield Campaign(pool, place)
