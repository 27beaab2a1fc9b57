"""The command line as a person types it: a process of its own."""

import os
import pty
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import PREFIX_SERVICE, Server

Finished = subprocess.CompletedProcess[str]
Run = Callable[..., Finished]


def run_command(
    *arguments: str | Path, environment: dict[str, str] | None = None, stdin: int = subprocess.DEVNULL
) -> Finished:
    """Run `prefix-service …` to its end."""
    command = [*PREFIX_SERVICE, *(str(argument) for argument in arguments)]
    return subprocess.run(
        command,
        check=False,
        stdin=stdin,
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200", **(environment or {})},
    )


@pytest.fixture
def run(server: Server) -> Run:
    """Run a command with the running service's URL and admin key in the environment; `typed` on a terminal."""

    def run_with_server(*arguments: str | Path, typed: str | None = None) -> Finished:
        environment = {"PREFIX_URL": server.url, "PREFIX_API_KEY": server.admin_key}
        if typed is None:
            return run_command(*arguments, environment=environment)
        keyboard, terminal = pty.openpty()
        os.write(keyboard, typed.encode())
        try:
            return run_command(*arguments, environment=environment, stdin=terminal)
        finally:
            os.close(keyboard)
            os.close(terminal)

    return run_with_server
