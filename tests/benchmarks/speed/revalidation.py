"""Measures 304s a second: ours, key check included, against routes that check nothing.

Eight connections, each with one request under way, driven by one process on raw sockets; the bare ASGI callable shows
what the client and uvicorn can do at all.
"""

import json
import tempfile
from contextlib import ExitStack
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Final

from tests.benchmarks.fleet import Shape
from tests.benchmarks.speed import peers
from tests.benchmarks.speed.harness import Chart, Outcome, Spread, in_turns, ratio, say
from tests.benchmarks.speed.load import Address, closed_loop, get
from tests.benchmarks.speed.ours import path_of, serving
from tests.benchmarks.tables import Grid

OURS: Final = "ours"
LOGGED: Final = "ours, a log line for each"
STARLETTE: Final = "Starlette route"
_APPS: Final = {"bare ASGI callable": "bare_304", STARLETTE: "starlette_304", "FastAPI route": "fastapi_304"}
_LOG_LEVELS: Final = {OURS: "warning", LOGGED: "info"}
_CONNECTIONS: Final = 8


def measure(*, quick: bool) -> Outcome:
    """Measures rounds in turns."""
    rounds, seconds = (3, 0.3) if quick else (15, 0.5)
    with tempfile.TemporaryDirectory(prefix="prefix-304-") as name, ExitStack() as stack:
        folder = Path(name)
        path = path_of(0, "batch_size=8&dtype=bfloat16", version="")
        cases = {}
        for case, log_level in list(_LOG_LEVELS.items())[: 1 if quick else 2]:
            ours = stack.enter_context(serving(folder / log_level, environment={"PREFIX_LOG_LEVEL": log_level}))
            ours.publish(Shape(), 1)
            etag = ours.ask(path).headers["etag"]
            request = ours.get(path, if_none_match=etag)
            cases[case] = partial(_rate, ours.address, request, seconds)
        told = ours.server.client(ours.key).get(path, headers={"If-None-Match": etag}).headers
        (folder / "head.json").write_text(json.dumps({name: told[name] for name in told if name != "date"}))
        for case, app in _APPS.items():
            address = stack.enter_context(peers.python_peer(app, folder)).address
            request = get(path, address, authorization=f"Bearer {ours.key}", if_none_match=etag)
            cases[case] = partial(_rate, address, request, seconds)
        say(f"  {rounds} rounds")
        rates = in_turns(cases, rounds)
    rows = [
        [case, str(Spread.of(found)), str(ratio(found, rates[STARLETTE]))]
        for case, found in sorted(rates.items(), key=lambda one: -Spread.of(one[1]).median)
    ]
    grid = Grid("304s a second: median of rounds (quartiles)", ["", "304s a second", "of a Starlette route"], rows)
    chart = Chart(
        "bars",
        "Revalidation",
        "304s a second",
        [row[0] for row in rows],
        {"304s a second": [Spread.of(rates[row[0]]).median for row in rows]},
        log_y=False,
    )
    return Outcome([grid], chart)


def _rate(address: Address, request: bytes, seconds: float) -> float:
    load = closed_loop(address, repeat(request), _CONNECTIONS, seconds)
    if set(load.statuses) != {304}:
        raise RuntimeError(f"answers other than 304: {dict(load.statuses)}")
    return load.rate
