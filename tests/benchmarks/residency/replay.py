"""Replays traces on this service's residency, and on the policies of libcachesim."""

import multiprocessing
import os
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Final

import libcachesim
import numpy as np

from prefix_service.registry.eviction import Residency
from tests.benchmarks.residency.traces import Ints, Trace

OURS: Final = "ours"
PEERS: Final = ("LRU", "S3FIFO", "Sieve", "GDSF", "WTinyLFU", "ARC", "Belady", "BeladySize")
_NEVER: Final = 2**62
_PATIENCE: Final = 20  # seconds; a trace takes less than two


@dataclass(frozen=True, slots=True)
class Ratios:
    """Hits by requests and by bytes."""

    objects: float
    bytes: float


def ratios(trace: Trace, hits: Ints) -> Ratios:
    """Returns the hits of all requests, even the first of each adapter, which nobody can serve from memory."""
    sizes = trace.sizes[trace.keys]
    return Ratios(float(hits.mean()), float((hits * sizes).sum() / sizes.sum()))


def ours(trace: Trace, budget: int) -> Ints:
    """Returns for each request whether its adapter was resident, 0 or 1."""
    residency: Residency[int] = Residency(budget)
    sizes, tenants = trace.sizes.tolist(), [str(tenant) for tenant in trace.tenants.tolist()]

    def served() -> Iterator[int]:
        for key in trace.keys.tolist():
            if hit := key in residency:
                residency.touch(key)
            else:
                residency.admit(key, sizes[key], tenants[key])
            yield hit

    return np.fromiter(served(), np.int64, len(trace.keys))


def peer(name: str, trace: Trace, budget: int) -> Ints | None:
    """Returns the hits of a policy of libcachesim; None if it does not end, as with objects as large as the budget.

    It runs in a process of its own, which can be ended, and whose millions of warnings are dropped.
    """
    forking = multiprocessing.get_context("fork")
    receiving, sending = forking.Pipe(duplex=False)
    process = forking.Process(target=_send_hits, args=(sending, name, trace, budget), daemon=True)
    process.start()
    try:
        return np.frombuffer(receiving.recv_bytes(), np.int64) if receiving.poll(_PATIENCE) else None
    finally:
        process.kill()
        process.join()


def _send_hits(sending: Connection, name: str, trace: Trace, budget: int) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    sending.send_bytes(_peer(name, trace, budget).tobytes())


def _peer(name: str, trace: Trace, budget: int) -> Ints:
    cache = getattr(libcachesim, name)(budget, hashpower=16)
    sizes = trace.sizes.tolist()
    request = libcachesim.Request()

    def served() -> Iterator[int]:
        for time, (key, next_use) in enumerate(zip(trace.keys.tolist(), _next_uses(trace.keys), strict=True)):
            request.obj_id, request.obj_size = key, sizes[key]
            request.clock_time, request.next_access_vtime = time, next_use
            yield cache.get(request)

    return np.fromiter(served(), np.int64, len(trace.keys))


def _next_uses(keys: Ints) -> list[int]:
    """Returns when each request's key is asked for again, for Belady's optimum."""
    seen: dict[int, int] = {}
    found = [_NEVER] * len(keys)
    for time in range(len(keys) - 1, -1, -1):
        key = int(keys[time])
        found[time] = seen.get(key, _NEVER)
        seen[key] = time
    return found
