"""Services that are forked from a process which has imported everything: a start costs no seconds of imports.

Tests alone use this; what measures a service starts a program of its own.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from prefix_service.cli import main

_CONTEXT: Final = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["prefix_service.cli.app", "prefix_service.api.processes.run"])


class Forked:
    """`prefix-service …` in a forked process, with as much of `subprocess.Popen` as tests ask for."""

    def __init__(self, arguments: Sequence[str], output: Path, environment: Mapping[str, str]) -> None:
        output.write_bytes(b"")
        there = (list(arguments), str(output), dict(environment), str(Path.cwd()))
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


def _run(arguments: list[str], output: str, environment: dict[str, str], folder: str) -> None:
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    log = os.open(output, os.O_WRONLY)
    for number in (1, 2):
        os.dup2(log, number)
    os.close(log)
    sys.argv = ["prefix-service", *arguments]
    main()
