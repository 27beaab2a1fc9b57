"""Makes traces of requests for adapters of tenants and sizes, each from its own fixed seed."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Sizes = Literal["uniform", "mixed"]

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
        """Returns the bytes of all adapters."""
        return int(self.sizes.sum())


def zipf(random: np.random.Generator, skew: float, adapters: int, requests: int) -> Ints:
    """Returns ranks 0 … `adapters - 1`, rank `r` with a probability proportional to `(r + 1) ** -skew`."""
    weights = np.arange(1, adapters + 1, dtype=np.float64) ** -skew
    return random.choice(adapters, requests, p=weights / weights.sum())


def _shuffled(random: np.random.Generator, ranks: Ints) -> Ints:
    """Returns adapters for ranks, so that popularity depends neither on an adapter's number nor on its size."""
    return random.permutation(ADAPTERS)[ranks]


def _zipf(skew: float) -> Callable[[np.random.Generator], Ints]:
    return lambda random: _shuffled(random, zipf(random, skew, ADAPTERS, REQUESTS))


def _scans(random: np.random.Generator) -> Ints:
    """Returns a Zipf trace in which, six times, a caller reads 5,000 adapters once, in every second request."""
    keys = _zipf(0.9)(random)
    for start in range(10_000, REQUESTS - 10_000, 30_000):
        keys[start : start + 10_000 : 2] = random.permutation(ADAPTERS)[:5_000]
    return keys


def _shifting(random: np.random.Generator) -> Ints:
    """Returns a Zipf trace in which a fifth of the adapters change places every 20,000 requests."""
    places, parts = random.permutation(ADAPTERS), []
    for ranks in np.split(zipf(random, 0.9, ADAPTERS, REQUESTS), 10):
        parts.append(places[ranks])
        moved = random.choice(ADAPTERS, ADAPTERS // 5, replace=False)
        places[moved] = places[random.permutation(moved)]
    return np.concatenate(parts)


def _bursts(random: np.random.Generator) -> Ints:
    """Returns a Zipf trace in which other workers repeat a request up to three times within the next fifty."""
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


def traces(sizes: Sizes) -> list[Trace]:
    """Returns a trace of every kind, asked for by one tenant."""
    found = []
    for seed, (name, kind) in enumerate(_KINDS.items()):
        random = np.random.default_rng(seed)
        keys = kind(random)
        large = random.random(ADAPTERS) < (CARTRIDGES if sizes == "mixed" else 0)
        found.append(Trace(name, keys, np.where(large, CARTRIDGE, PREFIX), np.zeros(ADAPTERS, dtype=np.int64)))
    return found


def by_tenants(tenants: int, *, in_blocks: bool) -> Trace:
    """Returns a Zipf trace in which popular adapters have the same tenants (blocks), or all tenants have some."""
    ranks = zipf(np.random.default_rng(99), 0.9, ADAPTERS, REQUESTS)
    numbers = np.arange(ADAPTERS)
    owners = numbers // (ADAPTERS // tenants) if in_blocks else numbers % tenants
    name = f"{tenants} tenants, popularity by {'tenant' if in_blocks else 'adapter'}"
    return Trace(name, ranks, np.full(ADAPTERS, PREFIX), owners)


@dataclass(frozen=True, slots=True)
class Neighbours:
    """Tenant 0 asks for `adapters` by Zipf 0.9, in the latter half in every second request, and tenant 1 then asks for
    each of its own `repeats` times in a row. All prefixes have one byte: a budget counts them.
    """

    adapters: int
    scanned: int = 5_000
    repeats: int = 1
    rate: int = 1  # requests of tenant 1 for each of tenant 0

    def trace(self) -> tuple[Trace, int]:
        """Returns the requests, and how many precede the scan."""
        random = np.random.default_rng(self.adapters)
        scan = np.repeat(np.arange(self.scanned), self.repeats) + self.adapters
        beside = len(scan) // self.rate
        before = 40_000
        own = zipf(random, 0.9, self.adapters, before + beside)
        mixed = np.empty(beside * (1 + self.rate), dtype=np.int64)
        mixed[:: 1 + self.rate] = own[before:]
        for turn in range(self.rate):
            mixed[turn + 1 :: 1 + self.rate] = scan[turn : beside * self.rate : self.rate]
        count = self.adapters + self.scanned
        tenants = (np.arange(count) >= self.adapters).astype(np.int64)
        keys = np.concatenate([own[:before], mixed])
        return Trace(f"{self.adapters} adapters", keys, np.ones(count, dtype=np.int64), tenants), before
