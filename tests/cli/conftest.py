"""The command line as a person types it: a process of its own."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import PREFIX_SERVICE, Server

Finished = subprocess.CompletedProcess[str]
Run = Callable[..., Finished]


def run_command(*arguments: str | Path, environment: dict[str, str] | None = None) -> Finished:
    """Run `prefix-service …` to its end."""
    command = [*PREFIX_SERVICE, *(str(argument) for argument in arguments)]
    return subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200", **(environment or {})},
    )


@pytest.fixture
def run(server: Server) -> Run:
    """Run a command with the running service's URL and admin key in the environment."""

    def run_with_server(*arguments: str | Path) -> Finished:
        return run_command(*arguments, environment={"PREFIX_URL": server.url, "PREFIX_API_KEY": server.admin_key})

    return run_with_server
