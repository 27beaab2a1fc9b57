"""`system.bounded`: a dictionary keeps what was put in last."""

from prefix_service.system.bounded import put_last


def test_the_first_entry_is_dropped() -> None:
    """An entry that is put in again counts as new, with its new value."""
    known: dict[str, int] = {}
    for key, value in (("a", 1), ("b", 2), ("a", 3), ("c", 4)):
        put_last(known, key, value, 2)
    assert list(known.items()) == [("a", 3), ("c", 4)]
