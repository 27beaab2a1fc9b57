"""Makes README.md and its plot of `page.md` and the findings."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Final

from tests.benchmarks.speed.harness import Outcome
from tests.benchmarks.speed.page import draw

HERE: Final = Path(__file__).parent
_PLACE: Final = "<!-- first token -->"


def keep(found: Outcome) -> None:
    """Writes the page, its plot, and the findings of which they were made."""
    draw(found.chart, HERE / "first_token.svg")
    (HERE / "results.json").write_text(json.dumps(asdict(found), indent=1, ensure_ascii=False) + "\n")
    grids = [grid.markdown() for grid in found.grids]
    section = "\n\n".join([f"{found.machine}.", *grids, f"![{found.chart.title}](first_token.svg)"])
    (HERE / "README.md").write_text((HERE / "page.md").read_text().replace(_PLACE, section))
