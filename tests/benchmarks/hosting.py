"""Serves thousands of adapters of many tenants under budgets that hold a few percent of them.

    python -m tests.benchmarks.hosting                                       # 10,000 adapters of 200 tenants
    python -m tests.benchmarks.hosting --adapters 300 --tenants 20 --seconds 5

Publishes through the API of a real server, then lets worker processes fetch by Zipf's law; every response is compared
with the keys and values that follow from the weights. Meanwhile the budgets are watched, and a probe measures one
adapter at a time, cold (just unloaded) and resident. At last the server is started again on the full folder, and on an
empty one.
"""

import argparse
import json
import multiprocessing
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.progress import Progress

from prefix_service.cli.console import print_table
from prefix_service.system.sizes import human_bytes
from tests.benchmarks.fleet import Hosted, Shape, percentile, publish_all, zipf
from tests.conftest import Server, running_server

# Llama-3-8B's 32 layers and 8 key/value heads; the heads' 128 dimensions are scaled down to 8, so that 10,000 fit.
SHAPES = [Shape(head_dim=8, tokens=tokens) for tokens in (20, 20, 20, 20, 10, 40, 20, 20, 20, 100)]


@dataclass(frozen=True, slots=True)
class Plan:
    """The sizes of everything."""

    adapters: int = 10_000
    tenants: int = 200
    share: float = 0.05
    skew: float = 1.0
    workers: int = 4
    seconds: float = 60


@dataclass(slots=True)
class Outcome:
    """The observations; latencies are in seconds."""

    published_per_second: float = 0
    total_bytes: int = 0
    budget: int = 0
    highest_used: int = 0
    samples: int = 0
    statuses: dict[int, int] = field(default_factory=dict)
    wrong: int = 0
    hit_ratio: float = 0
    seconds: float = 0
    latencies: list[float] = field(default_factory=list)
    cold: list[float] = field(default_factory=list)
    resident: list[float] = field(default_factory=list)
    start_full: list[float] = field(default_factory=list)
    start_empty: list[float] = field(default_factory=list)


def run(plan: Plan, folder: Path, console: Console) -> Outcome:
    """Runs the whole benchmark."""
    wanted = [
        (f"tenant-{number % plan.tenants:03}", f"adapter-{number:05}", SHAPES[number % len(SHAPES)])
        for number in range(plan.adapters)
    ]
    outcome = Outcome(total_bytes=sum(shape.nbytes for *_, shape in wanted))
    outcome.budget = int(outcome.total_bytes * plan.share)
    budgets = {name: str(outcome.budget) for name in ("PREFIX_DEVICE_BYTES", "PREFIX_RENDERING_BYTES")}
    with running_server(folder / "data", environment=budgets) as server:
        hosted = _publish(server, wanted, outcome, console)
        _serve(server, hosted, plan, outcome, console)
    for _ in range(5):
        outcome.start_full.append(_start(folder / "data"))
        with tempfile.TemporaryDirectory(dir=folder) as empty:
            _start(Path(empty))  # the first start makes the database and the key
            outcome.start_empty.append(_start(Path(empty)))
    return outcome


def _publish(server: Server, wanted: list[Any], outcome: Outcome, console: Console) -> list[Hosted]:
    began = time.monotonic()
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("publishing", total=len(wanted))
        hosted = publish_all(server.url, server.admin_key, wanted, 4, lambda: progress.advance(task))
    outcome.published_per_second = len(wanted) / (time.monotonic() - began)
    return hosted


def _start(data_dir: Path) -> float:
    began = time.monotonic()
    with running_server(data_dir):
        return time.monotonic() - began


def _serve(server: Server, hosted: list[Hosted], plan: Plan, outcome: Outcome, console: Console) -> None:
    key = server.key("read")
    before = _device(server)
    context = multiprocessing.get_context("spawn")
    with (
        console.status(f"{plan.workers} workers fetch for {plan.seconds:.0f} s"),
        ProcessPoolExecutor(plan.workers, mp_context=context) as pool,
        _beside(_watch, server, outcome),
        _beside(_probe, server, outcome, hosted),
    ):
        began = time.monotonic()
        work = [pool.submit(_fetch, server.url, key, hosted, plan, seed) for seed in range(plan.workers)]
        for statuses, wrong, latencies in [one.result() for one in work]:
            outcome.statuses = dict(Counter(outcome.statuses) + statuses)
            outcome.wrong += wrong
            outcome.latencies += latencies
        outcome.seconds = time.monotonic() - began
    after = _device(server)
    probes = len(outcome.cold)
    asked = sum(outcome.statuses.values())
    outcome.hit_ratio = 1 - (after["loads"] - before["loads"] - probes) / asked


def _device(server: Server) -> dict[str, Any]:
    found: dict[str, Any] = server.client().get("/v1/residency?limit=1").json()["tiers"][0]
    return found


@contextmanager
def _beside(work: Any, *arguments: Any) -> Iterator[None]:
    """Runs `work(stop, *arguments)` in a thread until the block ends."""
    stop = threading.Event()
    thread = threading.Thread(target=work, args=(stop, *arguments))
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _watch(stop: threading.Event, server: Server, outcome: Outcome) -> None:
    client = server.client()
    while not stop.wait(0.1):
        for tier in client.get("/v1/residency?limit=1").json()["tiers"]:
            outcome.highest_used = max(outcome.highest_used, tier["used"])
            outcome.samples += 1


def _probe(stop: threading.Event, server: Server, outcome: Outcome, hosted: list[Hosted]) -> None:
    """Reads one adapter at a time while the workers read: cold, and again immediately."""
    client = server.client()
    for number in zipf(len(hosted), 0, seed=-1):
        if stop.wait(0.1):
            return
        one = hosted[number]
        client.delete(f"/v1/tenants/{one.tenant}/adapters/{one.adapter}@1/residency")
        for latencies in (outcome.cold, outcome.resident):
            began = time.perf_counter()
            answer = client.get(one.path)
            latencies.append(time.perf_counter() - began)
            outcome.statuses[answer.status_code] = outcome.statuses.get(answer.status_code, 0) + 1
            outcome.wrong += not one.is_right(answer.content)


def _fetch(url: str, key: str, hosted: list[Hosted], plan: Plan, seed: int) -> tuple[Counter[int], int, list[float]]:
    """Fetches as a worker without a cache of its own, until the time is over."""
    statuses: Counter[int] = Counter()
    latencies: list[float] = []
    wrong = 0
    until = time.monotonic() + plan.seconds
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=60) as client:
        for number in zipf(len(hosted), plan.skew, seed):
            if time.monotonic() > until:
                return statuses, wrong, latencies
            began = time.perf_counter()
            answer = client.get(hosted[number].path)
            latencies.append(time.perf_counter() - began)
            statuses[answer.status_code] += 1
            wrong += answer.status_code == 200 and not hosted[number].is_right(answer.content)
    raise AssertionError("zipf never ends")


def show(plan: Plan, outcome: Outcome) -> None:
    """Prints the table."""

    def milliseconds(values: list[float]) -> str:
        shares = [(0.5, "median"), (0.99, "p99")]
        return ", ".join(f"{name} {percentile(values, share) * 1000:.1f} ms" for share, name in shares)

    full, empty = statistics.median(outcome.start_full), statistics.median(outcome.start_empty)
    rows: list[list[object]] = [
        ["adapters, tenants", f"{plan.adapters:,}, {plan.tenants:,}"],
        ["published through the API", f"{outcome.published_per_second:.0f} a second"],
        ["keys and values, budget of each tier", f"{human_bytes(outcome.total_bytes)}, {human_bytes(outcome.budget)}"],
        ["highest use seen", f"{outcome.highest_used / outcome.budget:.3f} of it in {outcome.samples:,} samples"],
        ["responses", ", ".join(f"{count:,} x {status}" for status, count in sorted(outcome.statuses.items()))],
        ["wrong tensors", outcome.wrong],
        ["fetched", f"{len(outcome.latencies) / outcome.seconds:.0f} a second by {plan.workers} workers"],
        ["from memory", f"{outcome.hit_ratio:.1%} of requests"],
        ["latency of all", milliseconds(outcome.latencies)],
        ["latency cold, under this load", milliseconds(outcome.cold)],
        ["latency resident, under this load", milliseconds(outcome.resident)],
        ["start until ready", f"{full:.2f} s full, {empty:.2f} s empty: {full - empty:+.2f} s"],
    ]
    print_table("Hosting", ["what", "measured"], rows)


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in asdict(Plan()).items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = vars(parser.parse_args())
    path = arguments.pop("json")
    plan = Plan(**arguments)
    with tempfile.TemporaryDirectory(prefix="prefix-hosting-") as folder:
        outcome = run(plan, Path(folder), Console(stderr=True))
    show(plan, outcome)
    if path is not None:
        path.write_text(json.dumps({"plan": asdict(plan), "outcome": asdict(outcome)}))


if __name__ == "__main__":
    main()
