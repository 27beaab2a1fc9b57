"""`prefix-service …`, forked from a process that has imported everything: a start costs no seconds of imports.

Tests alone use this; what measures a service starts a program of its own.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from prefix_service.cli import main
from tests.commands import WIDE, Finished

_CONTEXT: Final = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["prefix_service.cli.app", "prefix_service.api.processes.run"])


class Forked:
    """A command in a forked process, with as much of `subprocess.Popen` as tests ask for."""

    def __init__(
        self, arguments: Sequence[str], output: Path, environment: Mapping[str, str], errors: Path | None = None
    ) -> None:
        """`output` gets what it prints, and its errors too unless they have a file of their own."""
        files = [str(output), str(errors or output)]
        for file in files:
            Path(file).write_bytes(b"")
        there = (list(arguments), files, dict(environment), str(Path.cwd()))
        self._process = _CONTEXT.Process(target=_run, args=there)
        self._process.start()
        self.pid: int = self._process.pid or 0

    @property
    def returncode(self) -> int | None:
        """Its exit status, or minus the signal that ended it; None before its end was noticed."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """The same, of this moment."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status, once it has ended.

        Raises:
            subprocess.TimeoutExpired: it has not ended within so many seconds.
        """
        self._process.join(timeout)
        if (status := self._process.exitcode) is None:
            raise subprocess.TimeoutExpired("prefix-service", timeout or 0)
        return status

    def send_signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill it."""
        self.send_signal(signal.SIGKILL)


def run_forked(*arguments: str | Path, environment: Mapping[str, str] | None = None) -> Finished:
    """Run a command to its end, with nobody at its keyboard."""
    typed = [str(argument) for argument in arguments]
    with tempfile.TemporaryDirectory() as folder:
        output, errors = Path(folder) / "output", Path(folder) / "errors"
        status = Forked(typed, output, {**os.environ, **WIDE, **(environment or {})}, errors).wait()
        return Finished(typed, status, output.read_text(), errors.read_text())


def _run(arguments: list[str], files: list[str], environment: dict[str, str], folder: str) -> None:
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number, file in enumerate(files, start=1):  # one file has one position
        opened = number - 1 if file in files[: number - 1] else os.open(file, os.O_WRONLY)
        os.dup2(opened, number)
    sys.argv = ["prefix-service", *arguments]
    main()
