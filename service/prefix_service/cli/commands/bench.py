"""`bench`: how fast this service is from this machine."""

import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from prefix_service.cli.commands.break_even import BreakEvenOptions, show_break_even, travelling
from prefix_service.cli.console import print_json, print_table, working
from prefix_service.cli.options import DEFAULT_URL, ApiKey, Json, Ref, Url, address, connect, unfolded
from prefix_service.prefix.references import parse_qualified
from prefix_service.prefix.variant import KVDtype
from prefix_service.system.sizes import human_bytes

if TYPE_CHECKING:
    from prefix_service.client import Prefix, PrefixClient


def register(app: typer.Typer) -> None:
    """Add this command to the command line."""
    app.command()(bench)


@dataclass(frozen=True, slots=True)
class Measured:
    """One row: the number of requests, their latencies in seconds, and the rate of all of them together."""

    what: str
    requests: int
    p50_seconds: float
    p99_seconds: float
    requests_per_second: float
    bytes_per_second: float


@unfolded
def bench(
    reference: Ref,
    even: BreakEvenOptions,
    seconds: Annotated[
        float, typer.Option(min=0.1, max=600, metavar="SECONDS", help="How long each row is measured.")
    ] = 2.0,
    concurrency: Annotated[
        int, typer.Option(min=1, max=64, metavar="N", help="Threads of the row with many at a time.")
    ] = 8,
    dtype: Annotated[
        str | None, typer.Option(metavar="DTYPE", help="float32, float16, bfloat16 or float8_e4m3fn.")
    ] = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    as_json: Json = False,
) -> None:
    """Measure how fast this service is from this machine.

    That is the latency, and the bytes a second, of fetching one adapter. A fetch brings the whole prefix. "Unchanged"
    asks whether the cached prefix is current, as a worker does before each batch; a version or a digest is never asked
    for again, so it has no such row.
    """
    if even.break_even != (even.model is not None):
        raise typer.BadParameter("--break-even needs --model MODEL, and --model is for --break-even")
    if even.model is not None:
        show_break_even(reference, dtype, even.model, even.device, even.most, url, api_key, as_json=as_json)
        return
    kind = cast("KVDtype | None", dtype)  # the client checks it
    with connect(url, api_key, shows_progress=True, cache_bytes=0) as client, working(f"fetching {reference}"):
        prefix, rows = _fetches(client, reference, kind, seconds, concurrency)
    if not parse_qualified(reference)[1].immutable:
        with connect(url, api_key, shows_progress=True) as client, working(f"asking for {reference} again"):
            client.get(reference, dtype=kind)
            rows += [_measured("unchanged (304)", lambda: client.get(reference, dtype=kind), seconds, 1, 0)]
    nbytes = travelling(prefix)
    if as_json:
        found = {"version": prefix.version, "bytes": nbytes, "url": address(url), "rows": [asdict(row) for row in rows]}
        print_json(found)
        return
    columns = ["what", "requests", "p50", "p99", "requests/s", "bytes/s"]
    title = f"{reference} = version {prefix.version}, {human_bytes(nbytes)}, from {address(url)}"
    print_table(title, columns, [_shown(row) for row in rows])


def _fetches(
    client: "PrefixClient", reference: str, dtype: "KVDtype | None", seconds: float, concurrency: int
) -> "tuple[Prefix, list[Measured]]":
    """Returns the prefix, and the rows of its fetches: of the first, which makes a connection and may load the version,
    and of those that follow, one and many at a time."""
    import torch  # noqa: F401 - not part of what is measured

    began = time.perf_counter()
    prefix = client.get(reference, dtype=dtype)
    first = time.perf_counter() - began
    nbytes = travelling(prefix)
    one = f"{reference.partition('@')[0]}@{prefix.digest}"  # an alias may move meanwhile

    def fetch() -> None:
        client.get(one, dtype=dtype)

    return prefix, [
        Measured("first fetch", 1, first, first, 1 / first, nbytes / first),
        _measured("fetch", fetch, seconds, 1, nbytes),
        _measured(f"fetch, {concurrency} at a time", fetch, seconds, concurrency, nbytes),
    ]


def _measured(what: str, call: Callable[[], Any], seconds: float, concurrency: int, nbytes: int) -> Measured:
    """Call it for so many seconds in so many threads; each call moves `nbytes`."""
    began = time.perf_counter()
    until = began + seconds

    def repeat(_thread: int) -> list[float]:
        latencies: list[float] = []
        while (start := time.perf_counter()) < until or not latencies:
            call()
            latencies.append(time.perf_counter() - start)
        return latencies

    with ThreadPoolExecutor(concurrency) as threads:
        latencies = sorted(latency for each in threads.map(repeat, range(concurrency)) for latency in each)
    rate = len(latencies) / (time.perf_counter() - began)
    p50, p99 = (latencies[math.ceil(share * len(latencies)) - 1] for share in (0.5, 0.99))
    return Measured(what, len(latencies), p50, p99, rate, rate * nbytes)


def _shown(row: Measured) -> list[object]:
    rate = round(row.requests_per_second) if row.requests_per_second >= 10 else round(row.requests_per_second, 1)
    moved = f"{human_bytes(row.bytes_per_second)}/s" if row.bytes_per_second else "none"
    p50, p99 = (f"{latency * 1000:.2f} ms" for latency in (row.p50_seconds, row.p99_seconds))
    return [row.what, row.requests, p50, p99, rate, moved]
