"""Runs `python -m tests.benchmarks.watchers` in short."""

from tests.benchmarks.watchers.__main__ import grid, measure


def test_every_watcher_waits_and_is_told() -> None:
    """Some watchers from addresses of their own wait beside a replica, and each receives a change of its tenant."""
    found = measure(40, seconds=0.5, settled=0)
    assert (found.watchers, len(grid(found).rows)) == (40, 6)
    assert min(found.without.memory, found.beside.memory) > 0
