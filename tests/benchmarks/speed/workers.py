"""Measures several processes on one data folder: `--workers 1`, `2` and `4`, with the client on the same cores."""

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Final

from tests.benchmarks.fleet import Shape
from tests.benchmarks.speed.harness import Chart, Outcome, Spread, in_turns, ratio, say
from tests.benchmarks.speed.load import Address, closed_loop
from tests.benchmarks.speed.ours import path_of, serving
from tests.benchmarks.tables import Grid

_CONNECTIONS: Final = 16
_FULL, _SMALL, _CURRENT = "200, 2.6 MB", "200, 80 KiB", "304"


def measure(*, quick: bool) -> Outcome:
    """Measures every number of processes in turns, each with a server of its own that is idle meanwhile."""
    processes, rounds, seconds = ((1, 2), 2, 0.3) if quick else ((1, 2, 4), 11, 0.7)
    cases: dict[str, Callable[[], float]] = {}
    with tempfile.TemporaryDirectory(prefix="prefix-workers-") as name, ExitStack() as stack:
        for number in processes:
            options = ("--workers", str(number))
            ours = stack.enter_context(serving(Path(name) / str(number), *options))
            ours.publish(Shape(), 1)
            ours.publish(Shape(head_dim=4), 2)
            full, small = (path_of(adapter, "dtype=bfloat16") for adapter in (0, 1))
            etag = ours.ask(small).headers["etag"]
            requests = {_FULL: ours.get(full), _SMALL: ours.get(small), _CURRENT: ours.get(small, if_none_match=etag)}
            for what, request in requests.items():
                cases[_name(what, number)] = partial(_rate, ours.address, request, seconds)
        say(f"  {rounds} rounds")
        rates = in_turns(cases, rounds, warm_up=2)
    rows = []
    for what in requests:
        one = rates[_name(what, 1)]
        rows.append([what, str(Spread.of(one)), *(str(ratio(rates[_name(what, n)], one)) for n in processes[1:])])
    head = ["", "answers a second of one process", *(f"of {number}, times that" for number in processes[1:])]
    series: dict[str, list[float | None]] = {
        what: [Spread.of(rates[_name(what, number)]).median for number in processes] for what in requests
    }
    names = [str(number) for number in processes]
    chart = Chart("lines", "Several processes", "answers a second", names, series, "processes", log_y=False)
    return Outcome([Grid(f"{_CONNECTIONS} connections: median of rounds (quartiles)", head, rows)], chart)


def _name(what: str, processes: int) -> str:
    return f"{what}, {processes}"


def _rate(address: Address, request: bytes, seconds: float) -> float:
    return closed_loop(address, repeat(request), _CONNECTIONS, seconds).rate
