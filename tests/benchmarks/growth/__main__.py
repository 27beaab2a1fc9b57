"""`python -m tests.benchmarks.growth [--sizes 1000 10000]` prints tables, and writes README.md with a plot.

results.json keeps the measurements, so that sizes can be measured one at a time.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
from matplotlib import pyplot as plt
from rich.console import Console

from tests.benchmarks.growth.measure import measure
from tests.benchmarks.tables import Grid

HERE: Final = Path(__file__).parent
RESULTS: Final = HERE / "results.json"
SIZES: Final = [1_000, 10_000, 100_000]

Found = dict[str, dict[str, dict[str, float]]]
"""The fields of `Noticed` by size and by step."""


def grids(found: Found) -> dict[str, Grid]:
    """Returns the three tables of the page."""
    steps = list(next(iter(found.values())))

    def grid(title: str, shown: Callable[[dict[str, float]], str], *leaving: str) -> Grid:
        rows = [[step, *(shown(found[size][step]) for size in found)] for step in steps if step not in leaving]
        return Grid(title, ["adapters", *(f"{int(size):,}" for size in found)], rows)

    return {
        "SECONDS": grid("Seconds", lambda one: f"{one['seconds']:.3g}", "nothing"),
        "SILENCE": grid("Longest wait for /livez, ms", lambda one: f"{1000 * one['silence']:.0f}", "start"),
        "WAIT": grid("Longest change of another tenant, ms", lambda one: f"{1000 * one['wait']:.0f}", "start"),
    }


def draw(found: Found, path: Path) -> None:
    """Draws seconds over the number of adapters as SVG, with the same bytes for the same figures."""
    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "prefix-service"
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    sizes = [int(size) for size in found]
    for step in next(iter(found.values())):
        if step != "nothing":
            axes.plot(sizes, [found[str(size)][step]["seconds"] for size in sizes], "o-", label=step)
    axes.set(title="What growth changes", xlabel="adapters", ylabel="seconds", xscale="log", yscale="log")
    axes.grid(alpha=0.3)
    figure.legend(fontsize=8, loc="outside right upper")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    """Measures, keeps, prints and writes."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.growth")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="adapters; others are kept as they were")
    parser.add_argument("--folder", type=Path, help="where the data goes, and is deleted; default: a temporary folder")
    options = parser.parse_args()
    found: Found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for size in options.sizes:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            measured: dict[str, Any] = {name: asdict(one) for name, one in measure(Path(folder), size).items()}
        found = dict(sorted({**found, str(size): measured}.items(), key=lambda item: int(item[0])))
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    console = Console()
    page = (HERE / "page.md").read_text()
    for name, grid in grids(found).items():
        console.print(grid.rich())
        page = page.replace(f"<!-- {name} -->", grid.markdown())
    (HERE / "README.md").write_text(page)
    draw(found, HERE / "growth.svg")


if __name__ == "__main__":
    main()
