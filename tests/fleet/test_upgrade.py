"""`python -m tests.fleet.upgrade` in short, from this release to itself: what replaces replicas loses nothing."""

from pathlib import Path

from tests.fleet.starting import Engines
from tests.fleet.upgrade import upgrading


def test_replicas_are_replaced_under_traffic(engines: Engines, tmp_path: Path) -> None:
    """One after another: every answer is right, whatever was acknowledged is there at every replica, and no caller gets
    an error."""
    with upgrading(engines, tmp_path) as upgrade:
        for number in range(3):
            upgrade.replace(number, 1)
        upgrade.compare()
    assert (upgrade.truth.wrong, upgrade.truth.lost) == ([], [])
    assert all(step.reads and step.writes for step in upgrade.steps)
    assert [dict(step.errors) for step in upgrade.steps] == [{}, {}, {}]
