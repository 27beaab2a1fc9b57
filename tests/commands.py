"""`prefix-service …`, run to its end: in this process, or in one of its own, which imports for a second or two."""

import io
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Final
from unittest.mock import patch

from prefix_service.cli import main

Finished = subprocess.CompletedProcess[str]

PREFIX_SERVICE: Final = [sys.executable, "-m", "prefix_service.cli"]
WIDE: Final = {"COLUMNS": "200"}
"""Lines are not broken."""


def run_command(*arguments: str | Path, environment: dict[str, str] | None = None) -> Finished:
    """Run a command in this process, with nobody at its keyboard: what it prints, and its exit status."""
    typed = ["prefix-service", *(str(argument) for argument in arguments)]
    output, errors = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.TextIOWrapper(io.BytesIO(), "utf-8")
    with (
        Path(os.devnull).open() as nobody,
        patch.object(sys, "argv", typed),
        patch.object(sys, "stdin", nobody),
        patch.dict(os.environ, {**WIDE, **(environment or {})}),
        redirect_stdout(output),
        redirect_stderr(errors),
    ):
        status = _status()
    return Finished(typed, status, _written(output), _written(errors))


def _status() -> int:
    try:
        main()
    except SystemExit as end:
        if isinstance(end.code, str):
            sys.stderr.write(f"{end.code}\n")
            return 1
        return end.code or 0
    return 0


def _written(stream: io.TextIOWrapper) -> str:
    stream.seek(0)
    return stream.read()


def run_process(
    *arguments: str | Path, environment: dict[str, str] | None = None, stdin: int = subprocess.DEVNULL
) -> Finished:
    """Run a command in a process of its own: one that serves, or for which the process, or a keyboard, matters."""
    return subprocess.run(
        [*PREFIX_SERVICE, *(str(argument) for argument in arguments)],
        check=False,
        stdin=stdin,
        capture_output=True,
        text=True,
        env={**os.environ, **WIDE, **(environment or {})},
    )
