"""Runs `python -m tests.benchmarks.changes` in short: what it counts must hold, and times are the command's."""

from pathlib import Path

import pytest

from prefix_service.client import watch
from tests.benchmarks.changes.__main__ import grids, measure
from tests.fleet.starting import Engines
from tests.postgresql import PostgreSQL
from tests.seaweedfs import SeaweedFS


def test_a_change_reaches_every_replica(
    postgresql: PostgreSQL, seaweedfs: SeaweedFS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A moved alias and a revoked key arrive with notifications and without; nobody reads what was before its own
    change; a watching client has what an alias moved to; and reads of what is in memory send no statement.
    """
    monkeypatch.setattr(watch, "_PREFETCHED_WITHIN", 60.0)  # a slow machine may need more than a second
    engines = Engines.new(postgresql, seaweedfs)
    found = measure(engines, tmp_path, changes=2, seconds=1)
    postgresql.drop(engines.database)
    for followed in (found.notified, found.unnotified):
        assert (len(followed.moves), len(followed.revocations)) == (2, 2)
    assert (found.written.stale, len(found.written.seconds)) == (0, 6)
    assert found.written.refused < 6  # a replica that follows late says so
    assert (found.watched.cold, len(found.watched.seconds)) == (0, 2)
    # Replicas send some statements now and then, such as heartbeats; each read would send its own.
    of_reads = [count for text, count in found.loaded.sent.items() if text not in found.idle.sent]
    assert max(of_reads, default=0) < 0.5 * found.loaded.requests
    assert [len(grid.rows) for grid in grids(found).values()] == [6, 3, 2]
