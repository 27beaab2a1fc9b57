"""`python -m tests.benchmarks.precision` prints its tables, and writes them into README.md, with a plot beside it."""

import tempfile
from pathlib import Path
from typing import Final

import matplotlib as mpl
from matplotlib import pyplot as plt
from rich.console import Console

from prefix_service.client import PrefixClient
from prefix_service.client.prefixes.float8_error import ErrorFigures
from prefix_service.client.prefixes.precision import PairCost
from tests.benchmarks.precision.measure import Rounded, adapters, demo_cases, predictions, publish, rounded
from tests.benchmarks.tables import Grid
from tests.conftest import running_server

HERE: Final = Path(__file__).parent


def errors(found: list[Rounded]) -> Grid:
    """Returns the table of errors of keys and values."""

    def cell(error: ErrorFigures) -> str:
        return f"{error.max_absolute:.2g} / {error.mean_absolute:.2g} / {error.mean_relative:.2%}"

    head = ["adapter", "dtype", "keys: max / mean / mean relative", "values: the same"]
    return Grid(
        "Errors of keys and values", head, [[one.name, one.dtype, cell(one.keys), cell(one.values)] for one in found]
    )


def pairs(found: dict[str, list[PairCost]]) -> Grid:
    """Returns the table of all pairs of dtypes, with the bytes, divergence and changed tokens of each adapter."""
    columns = [f"{name}, {costs[0].tokens} tokens" for name, costs in found.items()]
    rows = [
        [
            costs[0].key_dtype,
            costs[0].value_dtype,
            *(f"{it.nbytes:,} / {it.divergence:.1e} / {it.changed}" for it in costs),
        ]
        for costs in zip(*found.values(), strict=True)
    ]
    return Grid("Bytes / divergence / tokens changed", ["keys", "values", *columns], rows)


def plot(found: dict[str, list[PairCost]]) -> None:
    """Plots the divergence of each pair against its bytes, as a part of those of float32."""
    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "prefix-service"
    figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    for (name, costs), marker in zip(found.items(), "o^sv", strict=False):
        most = costs[0].nbytes
        shown = [(cost.nbytes / most, cost.divergence) for cost in costs if cost.divergence > 0]
        axes.plot(*zip(*shown, strict=True), marker, label=name, fillstyle="none")
    axes.set(xlabel="bytes, of float32", ylabel="divergence, nats per token", yscale="log")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(HERE / "precision.svg", metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    """Measures, prints and writes."""
    with (
        tempfile.TemporaryDirectory() as folder,
        running_server(Path(folder)) as server,
        PrefixClient(server.url, server.admin_key) as client,
    ):
        publish(client)
        values = [one for name in adapters() for one in rounded(client, name)]
        costs = {case.name: predictions(client, case) for case in demo_cases()}
    console = Console(width=160)
    page = (HERE / "page.md").read_text()
    for name, grid in (("PAIRS", pairs(costs)), ("VALUES", errors(values))):
        console.print(grid.rich())
        page = page.replace(f"<!-- {name} -->", grid.markdown())
    (HERE / "README.md").write_text(page)
    plot(costs)


if __name__ == "__main__":
    main()
