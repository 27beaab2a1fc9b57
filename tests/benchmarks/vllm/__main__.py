"""`python -m tests.benchmarks.vllm [--quick]` prints a table, and writes README.md with a plot.

`--quick` is a smoke test and writes nothing.
"""

import argparse

from rich.console import Console

from tests.benchmarks.vllm.first_token import measure
from tests.benchmarks.vllm.link import enter


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rounds of short prefixes; the page stays as it is")
    arguments = parser.parse_args()
    enter()
    if not arguments.quick:
        from tests.benchmarks.vllm.page import keep  # draws with the extra `bench`: without it, this fails at once
    found = measure(quick=arguments.quick)
    for grid in found.grids:
        Console(width=160).print(grid.rich())
    if not arguments.quick:
        keep(found)


if __name__ == "__main__":
    main()
