"""The attacks in short: the service lives within its budgets, the neighbour gets its bytes; times are not judged."""

from collections.abc import Iterator

import pytest

from tests.attack.attacks import ATTACKS, Attack
from tests.attack.trial import Stage, attacked, staged


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """One service for all attacks, one after another."""
    with staged(tmp_path_factory.mktemp("attack"), print) as made:
        yield made


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_nobody_is_hurt(stage: Stage, attack: Attack) -> None:
    """Half a second of each attack, beside a neighbour that reads."""
    broken = (found := attacked(stage, attack, 0.5)).broken(stage, attack)
    if len(broken) == 1 and found.seen.statuses.keys() == {"503"}:
        # Other work of a slow machine may hold the catalog up for two seconds, but hardly each time.
        broken = attacked(stage, attack, 0.5).broken(stage, attack)
    assert broken == []


def test_nothing_is_a_defect(stage: Stage) -> None:
    """After all attacks the log holds no traceback."""
    assert "Traceback" not in stage.server.log.read_text()
