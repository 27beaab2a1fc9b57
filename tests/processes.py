"""Finds the processes of a service that tests kill and stop, and the lines of its log."""

import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest

from tests.forked import SPARE

T = TypeVar("T")


def skip_under_nohup(number: signal.Signals) -> None:
    """Skips a test of SIGHUP if the tests run under `nohup`: the services that they start ignore it too."""
    if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
        pytest.skip("the tests run under nohup")


def workers_of(supervisor: int) -> list[int]:
    """Returns the processes that a supervisor started to serve, in the order of their starts."""
    children = [int(child) for child in Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split()]
    tracker, spare = b"resource_tracker", f"{SPARE}\n".encode()
    return [child for child in children if tracker not in _read(child, "cmdline") and _read(child, "comm") != spare]


def is_alive(pid: int) -> bool:
    """Returns whether a process runs, or is stopped; one that has ended may wait for its parent."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def eventually(found: Callable[[], T], seconds: float = 60) -> T:
    """Returns the first true result of a function.

    Raises:
        AssertionError: it had none for so many seconds.
    """
    deadline = time.monotonic() + seconds
    while not (it := found()):
        assert time.monotonic() < deadline, f"not within {seconds:g} seconds"
        time.sleep(0.02)
    return it


def lines_of(log: Path, event: str) -> list[dict[str, Any]]:
    """Returns the lines of a log that have this event."""
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{") and line.endswith("}")]
    return [line for line in lines if line["event"] == event]


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fails unless the block ends within so many seconds."""
    started = time.monotonic()
    yield
    took = time.monotonic() - started
    assert took < seconds, f"took {took:.1f} seconds"


def _read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""
