"""Measures the microseconds of the calls that run on the event loop."""

import time
from collections.abc import Callable
from functools import partial
from typing import Final

import numpy as np

from prefix_service.registry.eviction import Residency
from tests.benchmarks.residency.traces import zipf

ENTRIES: Final = 40_000
TENANTS: Final = 200
_CALLS: Final = 50_000


def measure() -> dict[str, tuple[float, float]]:
    """Returns each call's median and 99.9th percentile, with 40,000 entries of 200 tenants resident."""
    residency: Residency[int] = Residency(ENTRIES)
    for key in range(ENTRIES):
        residency.admit(key, 1, str(key % TENANTS))
    random = np.random.default_rng(0)
    wanted = iter(zipf(random, 0.9, 4 * ENTRIES, 4 * _CALLS).tolist())
    hits, misses = [], []
    for key in wanted:
        if key in residency:
            hits.append(_timed(partial(_use, residency, key)))
        else:
            misses.append(_timed(partial(residency.admit, key, 1, str(key % TENANTS))))
    return {"hit (touch, lease, release)": _summary(hits), "miss (admit, one victim)": _summary(misses)}


def _use(residency: Residency[int], key: int) -> None:
    residency.touch(key)
    residency.release(residency.lease(key))


def _timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) * 1e6


def _summary(times: list[float]) -> tuple[float, float]:
    return float(np.median(times)), float(np.quantile(times, 0.999))
