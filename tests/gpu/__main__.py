"""`python -m tests.gpu [service] [connector] [benchmarks]` prints one table; `bash tests/gpu/run` calls it.

The status is 0 only if every part ran, and every row passed: a row that could not be run counts as one that failed.
"""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

import torch
from rich.console import Console

from tests.gpu import connector, service, timings
from tests.gpu.rows import NOT_RUN, PASSED, Row, table

_PARTS: Final = (service.PART, connector.PART, timings.PART)
_TABLE: Final = Path(__file__).with_name("table.md")


def main(asked: list[str]) -> int:
    """Runs the parts; returns the exit status."""
    unknown = sorted(set(asked) - set(_PARTS))
    if unknown:
        raise SystemExit(f"there is no part {', '.join(unknown)}: choose of {', '.join(_PARTS)}, or name none for all")
    has_gpu = torch.cuda.is_available()
    where = torch.cuda.get_device_name() if has_gpu else "a machine WITHOUT A GPU"
    console, rows = Console(stderr=True), []
    for row in _rows(asked or _PARTS, has_gpu=has_gpu):
        console.print(
            f"{row.result:8} {row.part}: {row.what}: {row.told}", markup=False, highlight=False, soft_wrap=True
        )
        rows.append(row)
    made = table(f"{where}, torch {torch.__version__}", rows).markdown()
    print(made)  # noqa: T201 - this is a command
    missing = sum(row.result != PASSED for row in rows)
    if has_gpu:
        _TABLE.write_text(made + "\n")
    else:
        console.print(
            "NO GPU: torch sees no NVIDIA GPU here. Nothing above was shown on one, and this run FAILS.",
            style="bold red",
        )
    console.print(f"{len(rows) - missing} of {len(rows)} rows passed", style="bold")
    return 0 if has_gpu and not missing else 1


def _rows(asked: Iterable[str], *, has_gpu: bool) -> Iterator[Row]:
    for part in _PARTS:
        if part not in asked:
            yield Row(part, "all", NOT_RUN, "this part was not asked for")
        elif part == service.PART:
            yield from service.rows()
        elif part == connector.PART:
            yield from connector.rows(has_gpu=has_gpu)
        else:
            yield from timings.rows(has_gpu=has_gpu)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
