"""Forks `prefix-service …`, and the workers of a service, from processes that have imported everything, so that a start
costs no seconds of imports.

Tests alone use this; measurements start a program of their own.
"""

import contextlib
import multiprocessing
import os
import pickle
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

from prefix_service.api.processes import supervisor
from prefix_service.api.processes.worker import die_with
from prefix_service.cli import main
from tests.commands import WIDE, Finished

SPARE: Final = "spare"
"""The name of a process that waits to become a worker, in `/proc`."""
_REPLACEMENTS: Final = 6
_CONTEXT: Final = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["prefix_service.cli.app", "prefix_service.api.processes.run"])


class Forked:
    """A command in a forked process, with the part of `subprocess.Popen` that tests need."""

    def __init__(
        self, arguments: Sequence[str], output: Path, environment: Mapping[str, str], errors: Path | None = None
    ) -> None:
        """Starts the command; `output` gets what it prints, and its errors too unless they have a file of their own."""
        files = [str(output), str(errors or output)]
        for file in files:
            Path(file).write_bytes(b"")
        there = (list(arguments), files, dict(environment), str(Path.cwd()))
        self._process = _CONTEXT.Process(target=_run, args=there)
        self._process.start()
        self.pid: int = self._process.pid or 0

    @property
    def returncode(self) -> int | None:
        """Returns the exit status, or minus the signal that ended it; None before its end was noticed."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """Returns the exit status at this moment, as `returncode` does."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Waits for the command's end, and returns its exit status.

        Raises:
            subprocess.TimeoutExpired: it has not ended within so many seconds.
        """
        self._process.join(timeout)
        if (status := self._process.exitcode) is None:
            raise subprocess.TimeoutExpired("prefix-service", timeout or 0)
        return status

    def send_signal(self, number: int) -> None:
        """Sends a signal, unless the command has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it has ended since
                os.kill(self.pid, number)

    def kill(self) -> None:
        """Kills the command."""
        self.send_signal(signal.SIGKILL)


def run_forked(*arguments: str | Path, environment: Mapping[str, str] | None = None) -> Finished:
    """Runs a command to its end without a keyboard."""
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
    workers = int(arguments[arguments.index("--workers") + 1]) if "--workers" in arguments else 0
    spares = _Spares(workers + _REPLACEMENTS if workers > 1 else 0)
    try:
        with patch.object(supervisor, "_SPAWN", spares):
            main()
    finally:
        spares.end()


class _Spares:
    """Gives a supervisor workers that were forked before it opened a file or started a thread, which a worker must not
    inherit. It has what a supervisor needs of `multiprocessing`'s context.
    """

    def __init__(self, count: int) -> None:
        self._spares = [_spare() for _ in range(count)]

    def Process(self, target: Callable[..., None], args: tuple[Any, ...]) -> BaseProcess:  # noqa: N802 - the context's
        """Returns a process that `start` gives this work.

        Raises:
            RuntimeError: there are no more.
        """
        if not self._spares:
            raise RuntimeError(
                f"a test may have {_REPLACEMENTS} workers replaced, see _REPLACEMENTS in tests/forked.py"
            )
        process, connection = self._spares.pop(0)

        def start() -> None:
            with connection:
                limit = resource.getrlimit(resource.RLIMIT_NOFILE)
                connection.send_bytes(ForkingPickler.dumps((dict(os.environ), limit, target, args)))

        process.start = start  # type: ignore[method-assign]
        return process

    def end(self) -> None:
        """Ends those that were not needed."""
        for process, connection in self._spares:
            process.kill()
            process.join()
            connection.close()


def _spare() -> tuple[BaseProcess, Connection]:
    mine, its = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=_wait_for_work, args=(its, os.getpid()))
    process.start()
    its.close()
    return process, mine


def _wait_for_work(connection: Connection, parent: int) -> None:
    die_with(parent)
    Path("/proc/self/comm").write_text(SPARE)
    try:
        received = connection.recv_bytes()
    except EOFError:  # the supervisor was killed
        return
    environment, limit, target, args = pickle.loads(received)  # noqa: S301 - from the supervisor
    Path("/proc/self/comm").write_text("worker")
    connection.close()
    os.environ.clear()
    os.environ.update(environment)
    resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    target(*args)
