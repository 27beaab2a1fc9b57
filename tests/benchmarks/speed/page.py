"""Makes README.md and its plots of `page.md` and the parts' findings, new and kept."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
from matplotlib import pyplot as plt

from tests.benchmarks.speed.harness import Chart, Outcome
from tests.benchmarks.speed.peers import version_of
from tests.benchmarks.tables import Grid

HERE: Final = Path(__file__).parent
_RESULTS: Final = HERE / "results.json"
_LEFT_OUT: Final = "*Not measured yet.*"


def keep(found: dict[str, Outcome]) -> None:
    """Adds new findings to the kept ones, and makes the page and all plots again."""
    kept: dict[str, Any] = json.loads(_RESULTS.read_text()) if _RESULTS.exists() else {}
    peers = [told for told in map(version_of, ("nginx", "redis-server")) if told]
    for part, outcome in found.items():
        kept[part] = {**asdict(outcome), "peers": peers}
    for part, one in kept.items():
        draw(Chart(**one["chart"]), HERE / f"{part}.svg")
    _RESULTS.write_text(json.dumps(dict(sorted(kept.items())), indent=1, ensure_ascii=False) + "\n")
    (HERE / "README.md").write_text(_filled((HERE / "page.md").read_text(), kept))


def _filled(page: str, kept: dict[str, Any]) -> str:
    lines = []
    for line in page.splitlines():
        part = line.removeprefix("<!-- ").removesuffix(" -->") if line.startswith("<!-- ") else None
        lines.append(line if part is None else _section(part, kept[part]) if part in kept else _LEFT_OUT)
    return "\n".join(lines) + "\n"


def _section(part: str, found: dict[str, Any]) -> str:
    command = f"`python -m tests.benchmarks.speed {part}`: {'; '.join([found['machine'], *found['peers']])}."
    grids = [Grid(**grid).markdown() for grid in found["grids"]]
    return "\n\n".join([command, *grids, f"![{found['chart']['title']}]({part}.svg)"])


def draw(chart: Chart, path: Path) -> None:
    """Draws a plot as SVG, with the same bytes for the same figures."""
    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "prefix-service"
    figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    if chart.kind == "bars":
        _bars(axes, chart)
    else:
        for name, values in chart.series.items():
            axes.plot(chart.x, [float("nan") if value is None else value for value in values], "o-", label=name)
    axes.set(title=chart.title, ylabel=chart.y_label, xlabel=chart.x_label)
    if chart.log_y:
        axes.set_yscale("log")
    if len(chart.series) > 1:
        figure.legend(fontsize=8, loc="outside lower center", ncols=3)
    axes.grid(axis="y", alpha=0.3)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _bars(axes: Any, chart: Chart) -> None:
    width = 0.85 / len(chart.series)
    for index, (name, values) in enumerate(chart.series.items()):
        places = [at + (index - (len(chart.series) - 1) / 2) * width for at in range(len(chart.x))]
        axes.bar(places, [value or 0 for value in values], width, label=name)
    axes.set_xticks(range(len(chart.x)), [name.replace(", ", ",\n") for name in chart.x])
