"""Measures what a tenant keeps of its hit ratio while another scans, compared with having the whole budget alone."""

from dataclasses import dataclass
from typing import Final

import numpy as np

from tests.benchmarks.residency.replay import OURS, ours, peer
from tests.benchmarks.residency.traces import Ints, Neighbours, Trace

BUDGET: Final = 1_000  # prefixes
CASES: Final = (
    Neighbours(400),
    Neighbours(800),
    Neighbours(2_000),
    Neighbours(10_000),
    Neighbours(800, rate=4),
    Neighbours(800, repeats=3),
    Neighbours(10_000, repeats=3),
)


@dataclass(frozen=True, slots=True)
class Kept:
    """Hit ratios of the first tenant over the same requests."""

    case: Neighbours
    policy: str
    alone: float
    beside: float

    @property
    def part(self) -> float:
        """Returns the part that is left of the lone figure."""
        return self.beside / self.alone


def measure(case: Neighbours, policy: str = OURS) -> Kept:
    """Returns the first tenant's hits from the moment that the other begins, with and without it."""
    trace, before = case.trace()
    own = trace.tenants[trace.keys] == 0
    alone = Trace(trace.name, trace.keys[own], trace.sizes, trace.tenants)
    return Kept(
        case, policy, float(_hits(policy, alone)[before:].mean()), float(_hits(policy, trace)[own][before:].mean())
    )


def _hits(policy: str, trace: Trace) -> Ints:
    hits = ours(trace, BUDGET) if policy == OURS else peer(policy, trace, BUDGET)
    return np.zeros(0, dtype=np.int64) if hits is None else hits
