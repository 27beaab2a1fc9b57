"""A reader's shell: a checkout, a network of its own in which port 8080 is free, and the README's first request."""

import contextlib
import os
import pty
import select
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from tests.missing import not_tested
from tests.pages.markdown import ROOT

_PATIENCE: Final = 180.0  # seconds
_PROMPT: Final = "ready-for-the-next-line$ "


class Story:
    """A folder like a checkout, in which snippets run one after another, each with what the ones before exported."""

    def __init__(self, folder: Path, network: list[str], environment: Mapping[str, str]) -> None:
        self.folder = folder
        self.network = network
        self._exported = folder / ".exported"
        self._exported.write_text("")
        self._groups: list[int] = []
        bin_ = folder / "bin"
        bin_.mkdir()
        (bin_ / "prefix-service").write_text(
            f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m prefix_service.cli "$@"\n'
        )
        (bin_ / "prefix-service").chmod(0o755)
        for name in ("service", "tests"):
            (folder / name).symlink_to(ROOT / name)
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PREFIX_")}
        self.environment = {
            **inherited,
            "PATH": f"{bin_}:{os.environ['PATH']}",
            "PYTHONPATH": f"{ROOT / 'service'}:{ROOT}",
            "GO111MODULE": "off",
            "COLUMNS": "100",
            **environment,
        }

    def sh(self, text: str) -> str:
        """Run a snippet of shell to its end; what it prints.

        Raises:
            AssertionError: a line of it failed.
        """
        script = f"set -euo pipefail\n. {self._exported}\n{text}\nexport -p > {self._exported}\n"
        return self._run(["bash", "-c", script])

    def python(self, text: str) -> str:
        """Run Python to its end, with what snippets of shell exported; what it prints."""
        program = self.folder / "program.py"
        program.write_text(text)
        return self.sh(f"{shlex.quote(sys.executable)} program.py")

    def _run(self, command: list[str]) -> str:
        output = self.folder / ".output"
        with output.open("wb") as file:
            process = subprocess.Popen(
                [*self.network, *command],
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
            self._groups.append(process.pid)
            status = process.wait(timeout=_PATIENCE)
        printed = output.read_text()
        assert status == 0, printed
        return printed

    def end(self) -> None:
        """End what snippets left running."""
        for group in self._groups:
            try:
                os.killpg(group, signal.SIGTERM)
            except ProcessLookupError:
                continue


@contextmanager
def network() -> Iterator[list[str]]:
    """What to put before a command so that it has loopback to itself, and port 8080 is free."""
    if os.geteuid() != 0 or shutil.which("unshare") is None or shutil.which("ip") is None:
        not_tested("a network namespace needs root, unshare and ip")
    holder = subprocess.Popen(
        ["unshare", "--net", "sh", "-c", "ip link set lo up && echo up && exec sleep infinity"], stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout is not None
        if holder.stdout.readline() != b"up\n":
            not_tested("this machine allows no network namespace")
        yield ["nsenter", f"--net=/proc/{holder.pid}/ns/net"]
    finally:
        holder.kill()
        holder.wait()
        if holder.stdout is not None:
            holder.stdout.close()


@contextmanager
def pasted(story: Story, text: str) -> Iterator[str]:
    """Paste a block into an interactive shell on a terminal, in one piece; what the terminal showed when the shell asks
    for the next line again. The shell, and what it started, runs while the block does."""
    controller, terminal = pty.openpty()
    shell = subprocess.Popen(
        [*story.network, "bash", "--norc", "--noprofile", "-i"],
        cwd=story.folder,
        env={**story.environment, "PS1": _PROMPT, "TERM": "dumb"},
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
    )
    os.close(terminal)
    try:
        _shown_until(controller, lambda shown: _PROMPT in shown)
        os.write(controller, text.encode())
        lines = text.count("\n")
        shown = _shown_until(controller, lambda shown: shown.count(_PROMPT) == lines)
        # A terminal is read on: its buffer is small, and the shell could not say that it ends.
        threading.Thread(target=_drain, args=(controller,), daemon=True).start()
        yield shown
    finally:
        os.write(controller, b"kill %1; wait; exit\n")
        try:
            shell.wait(timeout=90)
        finally:
            shell.kill()
            shell.wait()
            os.close(controller)


def _drain(controller: int) -> None:
    with contextlib.suppress(OSError):  # the other end is closed
        while os.read(controller, 65536):
            pass


def _shown_until(controller: int, holds: Callable[[str], bool]) -> str:
    shown = ""
    deadline = time.monotonic() + _PATIENCE
    while not holds(shown):
        assert time.monotonic() < deadline, shown
        if select.select([controller], [], [], 1)[0]:
            shown += os.read(controller, 65536).decode(errors="replace")
    return shown.replace("\r", "")
