"""Which test runs when, and in which of pytest-xdist's processes."""

from typing import Final

import pytest
from xdist.scheduler import LoadFileScheduling

_ONE_PROCESS: Final = "tests/vllm/"
_LONG: Final = (
    _ONE_PROCESS,
    "test_snippets.py",
    "test_demo.py",
    "processes/test_run.py",
    "test_faults.py",
    "test_hardening_crashes.py",
    "test_hardening_servers.py",
    "test_fuzz.py",
    "test_chaos.py",
    "test_deadlines.py",
    "test_supervisor.py",
    "client/test_answers.py",
    "test_walk.py",
)


class FilesInTurn(LoadFileScheduling):  # type: ignore[misc]  # without types
    """A file goes to the process that is free next; vLLM's go to one, which has a single vLLM of each kind running."""

    def _split_scope(self, nodeid: str) -> str:
        return _ONE_PROCESS if nodeid.startswith(_ONE_PROCESS) else super()._split_scope(nodeid)


def longest_first(items: list[pytest.Item]) -> None:
    """Files that take minutes begin first, or the last of them would run alone."""
    items.sort(key=lambda item: next((rank for rank, name in enumerate(_LONG) if name in item.nodeid), len(_LONG)))
