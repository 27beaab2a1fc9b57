"""`convert` ends every damaged or foreign file with one documented error."""

import random
from collections import Counter

from tests.client.damaged import DOCUMENTED, attempts, damaged, originals


def test_every_damaged_file_ends_in_one_line() -> None:
    """A few hundred mutations of every format, seeded: nothing but documented errors, each of one line."""
    kinds: Counter[str] = Counter()
    for name, number, error in attempts(480):
        kinds[type(error).__name__] += 1
        assert error is None or isinstance(error, DOCUMENTED), f"{number} {name}: {error!r}"
        assert error is None or len(str(error).splitlines()) == 1, f"{number} {name}: {error}"
    assert kinds.keys() >= {"InvalidCheckpoint", "InvalidConfig", "NoneType"}  # some damage does no harm


def test_mutations_are_mutations() -> None:
    """Nearly all of them change the file."""
    draw = random.Random(0)  # noqa: S311 - reproducible, not secret
    assert all(sum(damaged(draw, data) != data for _ in range(50)) > 45 for data in originals().values())
