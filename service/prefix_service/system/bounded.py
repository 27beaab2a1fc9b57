"""Dictionaries with a bound: whatever was put in first is dropped."""

from collections.abc import Hashable
from typing import TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


def put_last(known: dict[K, V], key: K, value: V, most: int) -> None:
    """Puts an entry at the end of a dictionary, and drops the first if there are more than `most`."""
    known.pop(key, None)
    known[key] = value
    if len(known) > most:
        del known[next(iter(known))]
