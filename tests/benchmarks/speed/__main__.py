"""`python -m tests.benchmarks.speed [part …] [--quick]` prints tables, and writes README.md with plots.

Parts that are not named keep what they found before. `--quick` is a smoke test and writes nothing.
"""

import argparse
import importlib.util
import time
from collections.abc import Callable
from typing import Final

from rich.console import Console

from tests.benchmarks.speed import (
    cached,
    choices,
    client,
    cold,
    digests,
    mixed,
    parsers,
    revalidation,
    scale,
    wire,
    worker,
    workers,
)
from tests.benchmarks.speed.harness import Outcome, say

PARTS: Final[dict[str, Callable[..., Outcome]]] = {
    "wire": wire.measure,
    "client": client.measure,
    "choices": choices.measure,
    "digests": digests.measure,
    "cached": cached.measure,
    "worker": worker.measure,
    "revalidation": revalidation.measure,
    "parsers": parsers.measure,
    "cold": cold.measure,
    "mixed": mixed.measure,
    "scale": scale.measure,
    "workers": workers.measure,
}


def run(parts: list[str], *, quick: bool) -> dict[str, Outcome]:
    """Returns what each part finds."""
    found = {}
    for part in parts:
        say(f"{part} …")
        began = time.monotonic()
        found[part] = PARTS[part](quick=quick)
        say(f"  {time.monotonic() - began:.0f} s")
        for grid in found[part].grids:
            Console(width=160).print(grid.rich())
    return found


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--quick", action="store_true", help="a smoke test in a minute; the page stays as it is")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"there is no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if not arguments.quick and importlib.util.find_spec("matplotlib") is None:
        parser.error("matplotlib, which draws the page, is not installed: pip install -e '.[bench]', or add --quick")
    for part in arguments.parts or PARTS:
        found = run([part], quick=arguments.quick)
        if not arguments.quick:
            from tests.benchmarks.speed.page import keep  # draws with the extra `bench`

            keep(found)


if __name__ == "__main__":
    main()
