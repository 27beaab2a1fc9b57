"""`python -m tests.benchmarks.vllm` prints a table, and writes README.md with a plot.

`--cold` and `--quick` write nothing.
"""

import argparse

from rich.console import Console

from tests.benchmarks.vllm.first_token import COLD, QUICK, WHOLE, Extent, measure
from tests.benchmarks.vllm.link import enter


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_mutually_exclusive_group()
    cold = "sixty rounds of a new adapter of 4,096 tokens and of its bytes alone"
    parts.add_argument("--cold", dest="part", action="store_const", const=COLD, help=cold)
    parts.add_argument("--quick", dest="part", action="store_const", const=QUICK, help="few rounds of short prefixes")
    part: Extent | None = parser.parse_args().part
    enter()
    if part is None:
        from tests.benchmarks.vllm.page import keep  # draws with the extra `bench`: without it, this fails at once
    found = measure(part or WHOLE)
    for grid in found.grids:
        Console(width=160).print(grid.rich())
    if part is None:
        keep(found)


if __name__ == "__main__":
    main()
