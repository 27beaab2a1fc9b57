"""Measures the cost of giving each caller its own copy of a cached prefix: until all its bytes are read, or written.

Sizes are Llama-3-8B prefixes in bfloat16, each fetched once before. *Shared* is the cache's own memory, which releases
before copy on write handed out to every caller; nobody may write to it. *Copied* is that memory and `clone()`. *get* is
`PrefixClient.get`: a private mapping, or below 2 MiB a copy. What a call returned is freed afterwards. The last column
is the memory of eight results, all of them read, beside the cache.
"""

import gc
import io
import re
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from prefix_service.client import PrefixClient
from prefix_service.client.flows import flows
from tests.benchmarks.fleet import Shape
from tests.benchmarks.speed.harness import QUIET, Chart, Outcome, Spread, in_turns, ratio, say
from tests.benchmarks.tables import Grid
from tests.conftest import running_server

_RESULTS = 8
_ROUNDS = {4: 400, 20: 200, 80: 100, 2048: 15}
"""Rounds by virtual tokens."""


def _ways(client: PrefixClient, reference: str) -> dict[str, Callable[[], Tensor]]:
    def shared() -> Tensor:
        return client._transport.run(flows.shared(client._reading, reference, {})).kv.tensor

    return {"shared": shared, "copied": lambda: shared().clone(), "get": lambda: client.get(reference).kv.tensor}


def _read(tensor: Tensor) -> None:
    tensor.view(torch.int64).sum()


def _seconds(way: Callable[[], Tensor], use: Callable[[Tensor], object]) -> float:
    began = time.perf_counter()
    found = way()
    use(found)
    seconds = time.perf_counter() - began
    del found
    return seconds


def _memory() -> int:
    gc.collect()
    found = re.search(r"^Pss:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text(), re.MULTILINE)
    return 0 if found is None else int(found[1]) << 10


def _taken(way: Callable[[], Tensor]) -> int:
    """Returns the bytes that results take which are kept and read."""
    before = _memory()
    kept = [way() for _ in range(_RESULTS)]
    for tensor in kept:
        _read(tensor)
    return max(_memory() - before, 0)


def measure(*, quick: bool) -> Outcome:
    """Publishes, fetches once, and measures the use of the cache."""
    rows: list[list[str]] = []
    medians: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder, running_server(Path(folder) / "data", environment=QUIET) as server:
        for tokens, rounds in {20: 5}.items() if quick else _ROUNDS.items():
            shape, reference = Shape(tokens=tokens), f"bench/tokens-{tokens}@1"
            size = f"{shape.nbytes / 1e6:.1f} MB"
            say(f"  {size}, {rounds} rounds")
            with PrefixClient(server.url, server.admin_key) as client:
                client.publish_files(f"bench/tokens-{tokens}", shape.config, io.BytesIO(shape.weights(tokens)[0]))
                ways = _ways(client, reference)
                cases: dict[str, Callable[[], float]] = {}
                for name, way in ways.items():
                    cases[f"{name}, read"] = partial(_seconds, way, _read)
                    if name != "shared":
                        cases[f"{name}, written"] = partial(_seconds, way, Tensor.zero_)
                found = in_turns(cases, rounds)
                taken = {name: _taken(way) for name, way in ways.items()}
            medians[size] = {name: 1000 * Spread.of(seconds).median for name, seconds in found.items()}
            for name, seconds in found.items():
                way_of, _, use = name.partition(", ")
                to_copy = "" if way_of == "shared" else str(ratio(found[f"copied, {use}"], seconds))
                spread = Spread.of([1000 * value for value in seconds])
                memory = f"{taken[way_of] / 1e6:.1f} MB" if use == "read" else ""
                rows.append([size if name == "shared, read" else "", name, str(spread), to_copy, memory])
    head = ["", "", "ms (quartiles)", "copied's time ÷ its", f"memory of {_RESULTS} results"]
    series: dict[str, list[float | None]] = {
        name: [found[name] for found in medians.values()] for name in next(iter(medians.values()))
    }
    chart = Chart("bars", "Until a cached prefix is read or written", "ms", list(medians), series)
    return Outcome([Grid("A cached prefix, each caller's own", head, rows)], chart)
