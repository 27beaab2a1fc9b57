"""Measures throughput and latency of 1,000 adapters in memory, asked for by Zipf's law over 16 connections.

Two ways: in a closed loop each connection asks again when it has its answer, which two cores cannot do without
queueing; in an open one requests fall due at random at a quarter of that rate, whatever the answers do. Beside ours,
the same loads of a bare uvicorn that has one answer of that size: what the machine and the asking process add.
"""

import random
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import repeat
from pathlib import Path
from typing import Final

from prefix_service.system.sizes import human_bytes
from tests.benchmarks.fleet import Hosted, Shape, percentile, zipf
from tests.benchmarks.speed.harness import Chart, Outcome, Spread, say
from tests.benchmarks.speed.load import Address, Load, Reader, closed_loop, get, open_loop
from tests.benchmarks.speed.memory import resident
from tests.benchmarks.speed.ours import Ours, serving
from tests.benchmarks.speed.peers import python_peer
from tests.benchmarks.tables import Grid

SHAPE: Final = Shape(head_dim=8)  # Llama-3-8B's layers and heads, their 128 dimensions scaled down: 160 KiB
SKEW: Final = 1.0
SHARES: Final = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999}
_CONNECTIONS: Final = 16
_LOOPS: Final = ("ours, closed loop", "one bytes object, closed loop", "ours, open loop", "one bytes object, open loop")


def measure(*, quick: bool) -> Outcome:
    """Measures rounds of both loops in turns, with ours and with a peer that has one answer."""
    adapters, rounds, seconds = (50, 2, 1.0) if quick else (1000, 7, 4.0)
    with (
        tempfile.TemporaryDirectory(prefix="prefix-mixed-") as name,
        serving(Path(name) / "data") as ours,
        ExitStack() as stack,
    ):
        ours.publish(SHAPE, adapters)
        warm_up(ours)
        files = ours.saved(Path(name) / "files", {"1": ours.hosted[0].path})
        peer = stack.enter_context(python_peer("one_object", files)).address
        loads: dict[str, list[Load]] = {loop: [] for loop in _LOOPS}
        for number in range(rounds):
            say(f"  round {number + 1} of {rounds}")
            for loop, found in zip(_LOOPS, _round(ours, peer, number, seconds), strict=True):
                loads[loop].append(found)
        must_be_right(ours, [load for found in loads.values() for load in found])
        held = human_bytes(resident(ours.pid))
    rows = [_row(loads[loop], loop) for loop in _LOOPS]
    title = (
        f"{adapters:,} adapters of {human_bytes(SHAPE.nbytes)}, Zipf {SKEW}, {_CONNECTIONS} connections; "
        f"the server has {held}: medians of {rounds} rounds (quartiles)"
    )
    series: dict[str, list[float | None]] = {
        loop: [Spread.of(_milliseconds(loads[loop], share)).median for share in SHARES.values()] for loop in _LOOPS
    }
    chart = Chart("bars", f"Latency over {adapters:,} adapters", "milliseconds", [*SHARES], series)
    return Outcome([Grid(title, ["", "a second", *(f"{share} ms" for share in SHARES), "p99 / p50"], rows)], chart)


def _round(ours: Ours, peer: Address, number: int, seconds: float) -> list[Load]:
    """Runs the loops in the order of `_LOOPS`; the open loops ask both at a quarter of the closed rate of ours."""
    requests = asked(ours, SKEW, seed=number)
    same = repeat(get("/1", peer))
    closed = [
        closed_loop(ours.address, requests, _CONNECTIONS, seconds),
        closed_loop(peer, same, _CONNECTIONS, seconds),
    ]
    rate = closed[0].rate / 4
    return [
        *closed,
        open_loop(ours.address, requests, _CONNECTIONS, seconds, rate),
        open_loop(peer, same, _CONNECTIONS, seconds, rate),
    ]


def _row(loads: list[Load], title: str) -> list[str]:
    tails = [percentile(load.latencies, 0.99) / percentile(load.latencies, 0.5) for load in loads]
    shares = [str(Spread.of(_milliseconds(loads, share))) for share in SHARES.values()]
    return [title, str(Spread.of([load.rate for load in loads])), *shares, str(Spread.of(tails))]


def _milliseconds(loads: list[Load], share: float) -> list[float]:
    return [percentile(load.latencies, share) * 1000 for load in loads]


def asked(ours: Ours, skew: float, seed: int) -> Iterator[bytes]:
    """Returns requests without end, with the same favourites whatever the seed."""
    requests = [ours.get(hosted.path) for hosted in ours.hosted]
    return (requests[number] for number in zipf(len(requests), skew, seed))


def warm_up(ours: Ours, first: int = 0) -> None:
    """Reads every adapter from `first` on once, so that it is in memory."""
    with Reader(ours.address) as reader:
        for hosted in ours.hosted[first:]:
            reader.read(ours.get(hosted.path))


def must_be_right(ours: Ours, loads: list[Load]) -> None:
    """Raises unless every answer was a 200, and a sample of adapters has the published keys and values."""
    statuses = {status for load in loads for status in load.statuses}
    sample: list[Hosted] = random.Random(0).sample(ours.hosted, min(20, len(ours.hosted)))  # noqa: S311
    wrong = [hosted.adapter for hosted in sample if not hosted.is_right(ours.ask(hosted.path).content)]
    if statuses != {200} or wrong:
        raise RuntimeError(f"statuses {statuses}, wrong keys and values of {wrong}")
