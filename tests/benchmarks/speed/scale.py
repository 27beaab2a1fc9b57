"""Measures how latency, throughput and memory grow with adapters and with concurrent workers."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

from prefix_service.system.sizes import human_bytes
from tests.benchmarks.fleet import Shape, percentile
from tests.benchmarks.speed.harness import Chart, Outcome, Spread, say
from tests.benchmarks.speed.load import Load, closed_loop
from tests.benchmarks.speed.memory import resident
from tests.benchmarks.speed.mixed import SKEW, asked, must_be_right, warm_up
from tests.benchmarks.speed.ours import Ours, serving
from tests.benchmarks.tables import Grid

SHAPE: Final = Shape(head_dim=4)  # Llama-3-8B's layers and heads, scaled down to 80 KiB: 10,000 fit by default

Loads = dict[int, list[Load]]
"""The loads of each round, by the number of connections."""


def measure(*, quick: bool) -> Outcome:
    """Measures the same server while adapters are added."""
    counts, rounds, seconds = ((20, 100), 1, 0.3) if quick else ((100, 1_000, 10_000), 3, 1.5)
    connections = (1, 16, 256) if quick else (1, 4, 16, 64, 256)
    found: dict[int, Loads] = {}
    memory: list[list[str]] = []
    with tempfile.TemporaryDirectory(prefix="prefix-scale-") as name, serving(Path(name) / "data") as ours:
        empty = resident(ours.pid)
        for count in counts:
            known = len(ours.hosted)
            ours.publish(SHAPE, count)
            warm_up(ours, known)
            memory.append(_memory(ours, empty))
            found[count] = _loads(ours, connections, rounds, seconds)
            must_be_right(ours, [load for loads in found[count].values() for load in loads])
            memory[-1].append(human_bytes(resident(ours.pid) - empty))
    head = ["connections", *(f"{count:,} adapters" for count in counts)]
    grids = [
        Grid(f"Answers a second, closed loop, {human_bytes(SHAPE.nbytes)} each, Zipf {SKEW}", head, _rates(found)),
        Grid("Milliseconds, p50 / p99", head, _latencies(found)),
        Grid("Memory above that of the empty server", _MEMORY, memory),
    ]
    return Outcome(grids, _chart(found, connections))


def _loads(ours: Ours, connections: tuple[int, ...], rounds: int, seconds: float) -> Loads:
    loads: Loads = {number: [] for number in connections}
    for turn in range(rounds):
        say(f"  {len(ours.hosted):,} adapters, round {turn + 1} of {rounds}")
        for number in connections:
            loads[number].append(closed_loop(ours.address, asked(ours, SKEW, seed=turn), number, seconds))
    return loads


_MEMORY: Final = ["adapters", "keys and values", "all in memory", "an adapter", "after the load"]


def _memory(ours: Ours, empty: int) -> list[str]:
    count, grown = len(ours.hosted), resident(ours.pid) - empty
    return [f"{count:,}", *map(human_bytes, (count * SHAPE.nbytes, grown, grown / count))]


def _rates(found: dict[int, Loads]) -> list[list[str]]:
    return _by_connections(found, lambda loads: str(Spread.of([load.rate for load in loads])))


def _latencies(found: dict[int, Loads]) -> list[list[str]]:
    return _by_connections(found, lambda loads: f"{_milliseconds(loads, 0.5):.1f} / {_milliseconds(loads, 0.99):.1f}")


def _milliseconds(loads: list[Load], share: float) -> float:
    return Spread.of([percentile(load.latencies, share) * 1000 for load in loads]).median


def _by_connections(found: dict[int, Loads], cell: Callable[[list[Load]], str]) -> list[list[str]]:
    numbers = next(iter(found.values()))
    return [[str(number), *(cell(loads[number]) for loads in found.values())] for number in numbers]


def _chart(found: dict[int, Loads], connections: tuple[int, ...]) -> Chart:
    series: dict[str, list[float | None]] = {
        f"{name}, {count:,} adapters": [_milliseconds(loads[number], share) for number in connections]
        for name, share in (("p50", 0.5), ("p99", 0.99))
        for count, loads in found.items()
    }
    names = [str(number) for number in connections]
    return Chart("lines", "Latency in a closed loop", "milliseconds", names, series, "connections")
