"""The attacks in short: the service lives within its budgets, the neighbour gets its bytes; times are not judged."""

from collections.abc import Iterator
from typing import Final

import pytest

from tests.attack.attacks import ATTACKS, Attack
from tests.attack.trial import Stage, attacked, staged

_GROUPS: Final = 6


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """One service for all attacks."""
    with staged(tmp_path_factory.mktemp("attack"), print) as made:
        yield made


@pytest.mark.parametrize("attacks", [list(ATTACKS.values())[first::_GROUPS] for first in range(_GROUPS)])
def test_nobody_is_hurt(stage: Stage, attacks: list[Attack]) -> None:
    """Three seconds of five attacks at the same time, beside a neighbour that reads."""
    assert attacked(stage, attacks, 3).broken(stage) == []


def test_nothing_is_a_defect(stage: Stage) -> None:
    """After all attacks the log holds no traceback."""
    assert "Traceback" not in stage.server.log.read_text()
