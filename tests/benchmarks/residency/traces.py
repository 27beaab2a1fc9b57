"""Requests for adapters: who asks for what, and how large it is. Every trace comes from its own fixed seed."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

ADAPTERS: Final = 10_000
REQUESTS: Final = 200_000
PREFIX: Final = 2_621_440  # bytes: 32 layers, 8 KV heads, 20 tokens of size 128 in bfloat16
CARTRIDGE: Final = 268_435_456  # the same model, 2,048 tokens
CARTRIDGES: Final = 0.01  # of all adapters: half of all bytes


@dataclass(frozen=True, slots=True)
class Trace:
    """`keys[i]` is asked for at time `i`; `sizes` and `tenants` are those of each key."""

    name: str
    keys: Ints
    sizes: Ints
    tenants: Ints

    @property
    def bytes(self) -> int:
        """Of everything that may be asked for."""
        return int(self.sizes.sum())


def zipf(random: np.random.Generator, skew: float, adapters: int, requests: int) -> Ints:
    """Ranks 0 … `adapters - 1`, rank `r` with a probability proportional to `(r + 1) ** -skew`."""
    weights = np.arange(1, adapters + 1, dtype=np.float64) ** -skew
    return random.choice(adapters, requests, p=weights / weights.sum())


def _shuffled(random: np.random.Generator, ranks: Ints) -> Ints:
    """Popularity has nothing to do with the number of an adapter, nor with its size."""
    return random.permutation(ADAPTERS)[ranks]


def _zipf(skew: float) -> Callable[[np.random.Generator], Ints]:
    return lambda random: _shuffled(random, zipf(random, skew, ADAPTERS, REQUESTS))


def _scans(random: np.random.Generator) -> Ints:
    """Zipf, and six times somebody reads 5,000 adapters once, one in two requests."""
    keys = _zipf(0.9)(random)
    for start in range(10_000, REQUESTS - 10_000, 30_000):
        keys[start : start + 10_000 : 2] = random.permutation(ADAPTERS)[:5_000]
    return keys


def _shifting(random: np.random.Generator) -> Ints:
    """Zipf, and every 20,000 requests a fifth of the adapters change places."""
    places, parts = random.permutation(ADAPTERS), []
    for ranks in np.split(zipf(random, 0.9, ADAPTERS, REQUESTS), 10):
        parts.append(places[ranks])
        moved = random.choice(ADAPTERS, ADAPTERS // 5, replace=False)
        places[moved] = places[random.permutation(moved)]
    return np.concatenate(parts)


def _bursts(random: np.random.Generator) -> Ints:
    """Zipf, each request repeated up to three times by other workers within the next fifty."""
    keys = _zipf(0.8)(random)[: REQUESTS // 2]
    keys = np.repeat(keys, random.integers(1, 4, len(keys)))[:REQUESTS]
    return keys[np.argsort(np.arange(len(keys)) + random.integers(0, 50, len(keys)), kind="stable")]


_KINDS: Final[dict[str, Callable[[np.random.Generator], Ints]]] = {
    "Zipf 0.7": _zipf(0.7),
    "Zipf 0.9": _zipf(0.9),
    "Zipf 1.1": _zipf(1.1),
    "scans": _scans,
    "shifting": _shifting,
    "bursts": _bursts,
}


def traces(kinds: Any = _KINDS) -> list[Trace]:
    """Every kind with uniform sizes and with mixed sizes, one tenant."""
    found = []
    for number, kind in enumerate(kinds):
        random = np.random.default_rng(number)
        keys = _KINDS[kind](random)
        mixed = np.where(random.random(ADAPTERS) < CARTRIDGES, CARTRIDGE, PREFIX)
        for name, sizes in (("uniform", np.full(ADAPTERS, PREFIX)), ("mixed", mixed)):
            found.append(Trace(f"{kind}, {name}", keys, sizes, np.zeros(ADAPTERS, dtype=np.int64)))
    return found
