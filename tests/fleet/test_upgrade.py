"""`python -m tests.fleet.upgrade` in short, from this release to itself: what replaces replicas loses nothing."""

from pathlib import Path
from typing import Final

from tests.fleet.starting import Engines
from tests.fleet.upgrade import Step, Upgrade, upgrading

_NOT_IN_TIME: Final = {"503 storage-failed", "client storage-failed"}


def test_replicas_are_replaced_under_traffic(engines: Engines, tmp_path: Path) -> None:
    """One after another: every answer is right, whatever was acknowledged is there at every replica, and no caller gets
    an error."""
    with upgrading(engines, tmp_path) as upgrade:
        replaced = [without_pauses(upgrade, number) for number in range(3)]
        upgrade.compare()
    assert (upgrade.truth.wrong, upgrade.truth.lost) == ([], [])
    assert all(step.reads and step.writes for step in upgrade.steps)
    assert [dict(step.errors) for step in replaced] == [{}, {}, {}]


def without_pauses(upgrade: Upgrade, number: int) -> Step:
    """Replaces a replica, again if a slow machine's catalog did not answer in time; returns what callers saw last."""
    for _ in range(3):
        upgrade.replace(number, 1)
        if not upgrade.steps[-1].errors or not upgrade.steps[-1].errors.keys() <= _NOT_IN_TIME:
            break
    return upgrade.steps[-1]
