"""`python -m tests.benchmarks.float8` prints its tables, and writes them into README.md in its folder."""

import tempfile
from pathlib import Path
from typing import Final

from rich.console import Console

from prefix_service.client import PrefixClient
from prefix_service.client.prefixes.float8_error import ErrorFigures
from tests.benchmarks.float8.measure import Found, corpus_cases, demo_cases, measure
from tests.benchmarks.tables import Grid
from tests.conftest import running_server

HERE: Final = Path(__file__).parent


def values(found: list[Found]) -> Grid:
    """Returns the table of errors of keys and values."""

    def cell(error: ErrorFigures) -> str:
        return f"{error.max_absolute:.2g} / {error.mean_absolute:.2g} / {error.mean_relative:.2%}"

    head = ["adapter", "dtype", "bytes", "of bfloat16", "keys: max / mean / mean relative", "values: the same"]
    half = {one.name: one.nbytes for one in found if one.dtype == "bfloat16"}
    rows = [
        [one.name, one.dtype, f"{one.nbytes:,}", f"{one.nbytes / half[one.name]:.3f}", cell(one.keys), cell(one.values)]
        for one in found
    ]
    return Grid("Errors of keys and values", head, rows)


def predictions(found: list[Found]) -> Grid:
    """Returns the table of changes of the next token."""
    head = ["adapter", "dtype", "mean divergence", "largest", "greedy continuations that change"]
    rows = [
        [
            one.name,
            one.dtype,
            f"{one.mean_divergence:.1e}",
            f"{one.max_divergence:.1e}",
            f"{one.changed} of {one.inputs}",
        ]
        for one in found
    ]
    return Grid("Next tokens", head, rows)


def main() -> None:
    """Measures, prints and writes."""
    found: list[Found] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        running_server(Path(folder)) as server,
        PrefixClient(server.url, server.admin_key) as client,
    ):
        for cases in (demo_cases(), corpus_cases()):
            for case in cases:
                found += measure(client, case)
    console = Console()
    page = (HERE / "page.md").read_text()
    for name, grid in (("VALUES", values(found)), ("PREDICTIONS", predictions(found))):
        console.print(grid.rich())
        page = page.replace(f"<!-- {name} -->", grid.markdown())
    (HERE / "README.md").write_text(page)


if __name__ == "__main__":
    main()
