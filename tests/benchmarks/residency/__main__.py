"""`python -m tests.benchmarks.residency` prints tables, and writes them into README.md with a plot in its folder."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, get_args

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt
from rich.console import Console

from tests.benchmarks.residency import neighbours, speed
from tests.benchmarks.residency.replay import OURS, PEERS, Ratios, ours, peer, ratios
from tests.benchmarks.residency.traces import Sizes, Trace, by_tenants, traces
from tests.benchmarks.tables import Grid

HERE: Final = Path(__file__).parent
SHARES: Final = (0.01, 0.05, 0.20)
POLICIES: Final = (OURS, *PEERS)


@dataclass(frozen=True, slots=True)
class Row:
    """Hit ratios of one trace under one budget, by policy."""

    sizes: Sizes
    trace: str
    share: float
    found: dict[str, Ratios | None]


def run(task: tuple[Sizes, Trace, float]) -> Row:
    """Replays one trace under one budget with every policy."""
    sizes, trace, share = task
    budget = int(trace.bytes * share)
    hits = {name: peer(name, trace, budget) for name in PEERS} | {OURS: ours(trace, budget)}
    found = {name: None if hit is None else ratios(trace, hit) for name, hit in hits.items()}
    return Row(sizes, trace.name, share, found)


def hit_ratios(rows: list[Row], sizes: Sizes) -> Grid:
    """Returns the table of hit ratios by objects, and by bytes too if they differ."""

    def cell(found: Ratios | None) -> str:
        if found is None:
            return "—"
        return _percent(found.objects) + (f" / {_percent(found.bytes)}" if sizes == "mixed" else "")

    what = "objects / bytes" if sizes == "mixed" else "objects"
    lines = [
        [row.trace, f"{row.share:.0%}", *(cell(row.found[policy]) for policy in POLICIES)]
        for row in rows
        if row.sizes == sizes
    ]
    return Grid(f"Hit ratio in %, {sizes} sizes ({what})", ["trace", "budget", *POLICIES], lines)


def beside_a_scan() -> Grid:
    """Returns the table of the part that the first tenant keeps of its lone figure."""
    lines = []
    for case in neighbours.CASES:
        found = [neighbours.measure(case, policy) for policy in (OURS, "LRU", "S3FIFO")]
        kept = [f"{_percent(one.alone)} → {_percent(one.beside)} ({one.part:.2f})" for one in found]
        lines.append([f"{case.adapters:,}", f"{case.scanned:,} x {case.repeats}", str(case.rate), *kept])
    head = ["its adapters", "scanned x reads of each", "scans a request", OURS, "LRU", "S3FIFO"]
    return Grid(f"A tenant's hit ratio alone → beside a scan; the budget holds {neighbours.BUDGET:,}", head, lines)


def price() -> Grid:
    """Returns the table of what fair shares cost the whole."""
    lines = []
    for in_blocks in (False, True):
        trace = by_tenants(200, in_blocks=in_blocks)
        together = replace(trace, tenants=np.zeros_like(trace.tenants))
        for share in SHARES:
            budget = int(trace.bytes * share)
            found = [ratios(one, ours(one, budget)).objects for one in (trace, together)]
            lines.append([trace.name, f"{share:.0%}", *map(_percent, found)])
    return Grid("Hit ratio of all in %, with fair share and as one tenant", ["trace", "budget", "shared", "one"], lines)


def durations() -> Grid:
    """Returns the table of the event loop's time."""
    lines = [[name, f"{median:.1f}", f"{rare:.1f}"] for name, (median, rare) in speed.measure().items()]
    title = f"Microseconds a call, {speed.ENTRIES:,} entries of {speed.TENANTS} tenants"
    return Grid(title, ["call", "median", "99.9 %"], lines)


def plot(rows: list[Row]) -> None:
    """Plots hits of each policy as a part of those of Belady's optimum, for uniform sizes."""
    mpl.use("Agg")
    shown = [row for row in rows if row.sizes == "uniform"]
    names = [f"{row.trace}\n{row.share:.0%}" for row in shown]
    figure, axes = plt.subplots(figsize=(11, 4), layout="constrained")
    for policy, marker in zip(("LRU", "S3FIFO", "Sieve", "GDSF", "WTinyLFU", "ARC", OURS), ".xv^s+o", strict=True):
        gained = [(found.objects if (found := row.found[policy]) else np.nan) / _optimum(row) for row in shown]
        axes.plot(names, gained, marker, label=policy, markersize=9 if policy == OURS else 6, fillstyle="none")
    axes.set(ylabel="hits / hits of Belady's optimum", ylim=(0, 1))
    axes.tick_params(axis="x", labelsize=7)
    axes.legend(ncols=7, loc="lower center", fontsize=8)
    axes.grid(axis="y", alpha=0.3)
    figure.savefig(HERE / "hit_ratios.png", dpi=80)


def _optimum(row: Row) -> float:
    found = row.found["Belady"]
    return found.objects if found else 1.0


def _percent(part: float) -> str:
    return f"{100 * part:.1f}"


def main() -> None:
    """Runs everything, in a few minutes."""
    tasks = [(sizes, trace, share) for sizes in get_args(Sizes) for trace in traces(sizes) for share in SHARES]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        rows = list(pool.map(run, tasks))
    grids = {
        "UNIFORM": hit_ratios(rows, "uniform"),
        "MIXED": hit_ratios(rows, "mixed"),
        "SCAN": beside_a_scan(),
        "PRICE": price(),
        "SPEED": durations(),
    }
    page = (HERE / "page.md").read_text()
    for name, grid in grids.items():
        Console(width=160).print(grid.rich())
        page = page.replace(f"<!-- {name} -->", grid.markdown())
    (HERE / "README.md").write_text(page)
    plot(rows)


if __name__ == "__main__":
    main()
