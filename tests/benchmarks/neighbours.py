"""Measures what a tenant notices while another one reads thousands of cold adapters, each once.

    python -m tests.benchmarks.neighbours

Three phases on one server, in turns, several times: the quiet tenant alone; beside a neighbour that reads resident
adapters; beside a neighbour that scans cold ones, at the same request rate. The quiet tenant fetches by Zipf's law at
a steady rate; its hit ratio is the share of its requests that no load from the disk answered.
"""

import argparse
import itertools
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
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

SHAPE = Shape(head_dim=8)  # Llama-3-8B's layers and heads, scaled down: 160 KiB
PHASES = ("alone", "beside a reader", "beside a scan")


@dataclass(frozen=True, slots=True)
class Plan:
    """The sizes of everything: adapters of both tenants, those that the budget holds, requests a second."""

    quiet: int = 1000
    scanned: int = 5000
    held: int = 700
    skew: float = 1.0
    quiet_rate: int = 40
    scan_rate: int = 70
    rounds: int = 2


@dataclass(slots=True)
class Phase:
    """The quiet tenant's observations in one phase, over all rounds."""

    hit_ratios: list[float] = field(default_factory=list)
    latencies: list[list[float]] = field(default_factory=list)

    @property
    def hit_ratio(self) -> float:
        """Returns the median of the rounds."""
        return statistics.median(self.hit_ratios)

    def latency(self, share: float) -> float:
        """Returns the median of the rounds' percentiles, in seconds."""
        return statistics.median(percentile(one, share) for one in self.latencies)


def run(plan: Plan, folder: Path, console: Console) -> dict[str, Phase]:
    """Runs all phases."""
    wanted = [("quiet", f"q-{number:04}", SHAPE) for number in range(plan.quiet)]
    wanted += [("noisy", f"n-{number:04}", SHAPE) for number in range(plan.scanned + 1)]
    budget = str(plan.held * SHAPE.nbytes)
    budgets = dict.fromkeys(("PREFIX_DEVICE_BYTES", "PREFIX_RENDERING_BYTES"), budget)
    with running_server(folder / "data", environment=budgets) as server, Progress(console=console) as progress:
        task = progress.add_task("publishing", total=len(wanted))
        hosted = publish_all(server.url, server.admin_key, wanted, 4, lambda: progress.advance(task))
        progress.update(task, description="measuring", total=3 * plan.rounds + 1, completed=0)
        phases = {name: Phase() for name in PHASES}
        _phase(server, plan, hosted, PHASES[0])  # the quiet tenant's favourites come into memory
        progress.advance(task)
        for _ in range(plan.rounds):
            for name in PHASES:
                hit_ratio, latencies = _phase(server, plan, hosted, name)
                phases[name].hit_ratios.append(hit_ratio)
                phases[name].latencies.append(latencies)
                progress.advance(task)
    return phases


def _phase(server: Server, plan: Plan, hosted: list[Hosted], name: str) -> tuple[float, list[float]]:
    quiet, noisy = hosted[: plan.quiet], hosted[plan.quiet :]
    seconds = plan.scanned / plan.scan_rate
    before = _loads(server)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        arguments = (server.url, server.admin_key, seconds)
        own = pool.submit(_quiet, *arguments, quiet, plan.quiet_rate, plan.skew)
        others: Future[int] | None = None
        if name != PHASES[0]:
            scan = noisy[1:] if name == PHASES[2] else noisy[:1]
            others = pool.submit(_noisy, *arguments, scan, plan.scan_rate)
        latencies = own.result()
        loads_of_others = 0 if others is None else others.result()
    misses = _loads(server) - before - loads_of_others
    return 1 - misses / len(latencies), latencies


def _loads(server: Server) -> int:
    loads: int = server.client().get("/v1/residency?limit=1").json()["tiers"][0]["loads"]
    return loads


def _paced(rate: float, seconds: float) -> Iterator[None]:
    """Yields at a steady rate, and does not make up for a late tick."""
    began = time.monotonic()
    for number in range(int(rate * seconds)):
        time.sleep(max(began + number / rate - time.monotonic(), 0))
        if time.monotonic() - began > seconds:
            return
        yield


def _quiet(url: str, key: str, seconds: float, hosted: list[Hosted], rate: int, skew: float) -> list[float]:
    latencies = []
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=60) as client:
        for _, number in zip(_paced(rate, seconds), zipf(len(hosted), skew, int(time.time())), strict=False):
            began = time.perf_counter()
            answer = client.get(hosted[number].path)
            latencies.append(time.perf_counter() - began)
            if not hosted[number].is_right(answer.content):
                raise RuntimeError(f"{hosted[number].path}: {answer.status_code} {answer.content[:200]!r}")
    return latencies


def _noisy(url: str, key: str, seconds: float, hosted: list[Hosted], rate: int) -> int:
    """Reads adapters one after another, from the start again if there are too few; returns how many were loaded."""
    asked = 0
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=60) as client:
        for _, one in zip(_paced(rate, seconds), itertools.cycle(hosted), strict=False):
            client.get(one.path).raise_for_status()
            asked += 1
    return min(asked, len(hosted))


def show(plan: Plan, phases: dict[str, Phase]) -> None:
    """Prints the table."""
    alone, reader = phases[PHASES[0]], phases[PHASES[1]]
    rows: list[list[object]] = []
    for name, phase in phases.items():
        rows.append(
            [
                name,
                f"{phase.hit_ratio:.1%}",
                f"{phase.hit_ratio / alone.hit_ratio:.2f}",
                f"{phase.latency(0.5) * 1000:.1f}",
                f"{phase.latency(0.99) * 1000:.1f}",
                f"{phase.latency(0.99) / reader.latency(0.99):.2f}",
            ]
        )
    budget = human_bytes(plan.held * SHAPE.nbytes)
    title = (
        f"The quiet tenant: {plan.quiet} adapters, {plan.quiet_rate} requests a second; budget {budget}, "
        f"{plan.held} adapters; its neighbour scans {plan.scanned} at {plan.scan_rate} a second"
    )
    columns = ["", "hits", "of alone", "median ms", "p99 ms", "of a reader's"]
    print_table(title, columns, rows)


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in asdict(Plan()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    plan = Plan(**vars(parser.parse_args()))
    with tempfile.TemporaryDirectory(prefix="prefix-neighbours-") as folder:
        phases: dict[str, Any] = run(plan, Path(folder), Console(stderr=True))
    show(plan, phases)


if __name__ == "__main__":
    main()
