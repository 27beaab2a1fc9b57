"""Decides which test runs when, and in which of pytest-xdist's processes."""

from typing import Final

import pytest
from xdist.scheduler import LoadFileScheduling

_ONE_PROCESS: Final = "tests/vllm/"
_LONG: Final = (
    _ONE_PROCESS,
    "test_snippets.py",
    "test_demo.py",
    "test_fuzz.py",
    "test_hardening_crashes.py",
    "catalog/test_authority.py",
    "test_chaos.py",
    "test_fleet_chaos.py",
    "client/test_answers.py",
    "processes/test_run.py",
    "test_supervisor.py",
    "test_attack.py",
    "test_walk.py",
    "test_faults.py",
    "test_hardening_servers.py",
    "test_deadlines.py",
)


class FilesInTurn(LoadFileScheduling):  # type: ignore[misc]  # without types
    """Gives a file to the process that is free next, and all of vLLM's files to one that runs a vLLM of each kind."""

    def _split_scope(self, nodeid: str) -> str:
        return _ONE_PROCESS if nodeid.startswith(_ONE_PROCESS) else super()._split_scope(nodeid)


def longest_first(items: list[pytest.Item]) -> None:
    """Moves files that take minutes to the front, or the last of them would run alone."""
    items.sort(key=lambda item: next((rank for rank, name in enumerate(_LONG) if name in item.nodeid), len(_LONG)))
