"""Measures what an HTTP parser costs, and what our bounds on connections add: uvicorn's own protocols against ours.

A bare Starlette app answers: 304s from a route with path parameters over eight connections that stay, and one body of
2.6 MB as one bytes object over one.
"""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import repeat
from typing import Any, Final, Literal

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from prefix_service.api.server.connections import Deadlines
from prefix_service.api.server.protocols import protocol_class
from tests.benchmarks.speed import peers
from tests.benchmarks.speed.apps import ROUTE
from tests.benchmarks.speed.harness import Chart, Outcome, Spread, in_turns, ratio, say
from tests.benchmarks.speed.load import Address, closed_loop, get
from tests.benchmarks.tables import Grid
from tests.conftest import free_port

_PARSERS: Final[tuple[Literal["httptools", "h11"], ...]] = ("httptools", "h11")
_BODY: Final = bytes(2_600_000)
_ETAG: Final = '"0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"'
_PATH: Final = "/v1/tenants/acme/adapters/summarize@prod/prefix?batch_size=8&dtype=bfloat16"
_FIRST: Final = "httptools, uvicorn"


def measure(*, quick: bool) -> Outcome:
    """Measures rounds in turns."""
    rounds, seconds = (3, 0.3) if quick else (15, 0.5)
    answers, bytes_ = {}, {}
    with ExitStack() as stack:
        for parser in _PARSERS:
            for kind in ("uvicorn", "ours"):
                case = f"{parser}, {kind}"
                address = stack.enter_context(_served(parser, kind))
                answers[case] = partial(_answers, address, seconds)
                bytes_[case] = partial(_gigabytes, address, seconds)
        say(f"  {rounds} rounds of each")
        rates, speeds = in_turns(answers, rounds), in_turns(bytes_, rounds)
    head = ["", "304s a second", "of the first", "GB/s", "of the first"]
    rows = [
        [
            case,
            str(Spread.of(rates[case])),
            str(ratio(rates[case], rates[_FIRST])),
            str(Spread.of(speeds[case])),
            str(ratio(speeds[case], speeds[_FIRST])),
        ]
        for case in rates
    ]
    bounds = [
        [parser] + [str(ratio(found[f"{parser}, ours"], found[f"{parser}, uvicorn"])) for found in (rates, speeds)]
        for parser in _PARSERS
    ]
    grids = [
        Grid("Parsers: median of rounds (quartiles)", head, rows),
        Grid("What is left with our bounds, of paired rounds", ["", "304s", "GB/s"], bounds),
    ]
    series: dict[str, list[float | None]] = {case: [Spread.of(found).median] for case, found in rates.items()}
    return Outcome(grids, Chart("bars", "Parsers", "304s a second", [""], series, log_y=False))


def _answers(address: Address, seconds: float) -> float:
    request = get(_PATH, address, authorization=f"Bearer pfx_{'a' * 40}", if_none_match=_ETAG)
    load = closed_loop(address, repeat(request), 8, seconds)
    if set(load.statuses) != {304}:
        raise RuntimeError(f"answers other than 304: {dict(load.statuses)}")
    return load.rate


def _gigabytes(address: Address, seconds: float) -> float:
    load = closed_loop(address, repeat(get("/body", address)), 1, seconds)
    if set(load.statuses) != {200}:
        raise RuntimeError(f"answers other than 200: {dict(load.statuses)}")
    return load.nbytes / load.seconds / 1e9


@contextmanager
def _served(parser: str, kind: str) -> Iterator[Address]:
    port = free_port()
    command = [sys.executable, "-m", "tests.benchmarks.speed.parsers", parser, kind, str(port)]
    with peers.started(command, port) as peer:
        yield peer.address


async def _not_modified(_request: Request) -> Response:
    return Response(status_code=304, headers={"ETag": _ETAG, "Cache-Control": "private, no-cache"})


async def _whole(_request: Request) -> Response:
    return Response(_BODY)


def main() -> None:
    """Serves the app until a signal; takes the parser, whose protocol, and the port."""
    parser, kind, port = sys.argv[1:]
    if parser not in _PARSERS:
        raise SystemExit(f"there is no parser {parser}")
    http: Any = protocol_class(parser, Deadlines(30, 60), lambda _header: None) if kind == "ours" else parser
    options: dict[str, Any] = {"loop": "uvloop", "http": http, "ws": "none", "lifespan": "off"}
    app = Starlette(routes=[Route(ROUTE, _not_modified), Route("/body", _whole)])
    options |= {"log_level": "warning", "access_log": False, "server_header": False, "timeout_keep_alive": 3600}
    uvicorn.run(app, port=int(port), **options)


if __name__ == "__main__":
    main()
