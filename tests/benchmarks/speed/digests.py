"""Measures how fast libraries compute a body's digest, which is what the client adds to a fetch.

One thread hashes a body in pieces of 1 MiB, as the client does on arrival, and takes turns with the other algorithms.
Figures are bytes for a second of processor time. `memcpy` copies the same pieces, for scale.
"""

import hashlib
import os
import time
import zlib
from collections.abc import Callable

import blake3
import crc32c
import google_crc32c

from prefix_service.prefix.wire.digests import Data, Hasher, new_hasher
from tests.benchmarks.fleet import Shape
from tests.benchmarks.speed.harness import Chart, Outcome, Spread, in_turns, say
from tests.benchmarks.tables import Grid

_PIECE = 1 << 20
_LEAST = 32 << 20  # bytes hashed for one figure


class _Running:
    """A checksum function with a running value, as a hasher."""

    def __init__(self, compute: Callable[[Data, int], int]) -> None:
        self._compute, self._value = compute, 0

    def update(self, data: Data, /) -> None:
        self._value = self._compute(data, self._value)

    def digest(self) -> bytes:
        return self._value.to_bytes(4, "big")


class _Copy:
    """A hasher that computes no digest: it copies each piece over the last one."""

    def __init__(self) -> None:
        self._target = bytearray(_PIECE)

    def update(self, data: Data, /) -> None:
        self._target[: len(data)] = data

    def digest(self) -> bytes:
        return b""


HASHERS: dict[str, Callable[[], Hasher]] = {
    "sha-256, hashlib": hashlib.sha256,
    "blake3, blake3": blake3.blake3,
    "crc32, zlib": lambda: _Running(zlib.crc32),
    "crc32c, google-crc32c": lambda: _Running(lambda data, value: google_crc32c.extend(value, bytes(data))),
    "crc32c, crc32c": lambda: _Running(crc32c.crc32c),
    "crc32c, awscrt (ours)": lambda: new_hasher("crc32c"),
    "memcpy": _Copy,
}


def rate(make: Callable[[], Hasher], body: memoryview) -> Callable[[], float]:
    """Returns a function that hashes the body as often as a figure needs, and returns bytes for a processor second."""

    def once() -> float:
        times = max(1, _LEAST // len(body))
        began = time.process_time()
        for _ in range(times):
            hasher = make()
            for start in range(0, len(body), _PIECE):
                hasher.update(body[start : start + _PIECE])
            hasher.digest()
        return times * len(body) / (time.process_time() - began)

    return once


def measure(*, quick: bool) -> Outcome:
    """Hashes bodies of the sizes of the client's part."""
    rows: list[list[str]] = []
    series: dict[str, list[float | None]] = {name: [] for name in HASHERS}
    sizes = [Shape(tokens=tokens).nbytes for tokens in ([20] if quick else [20, 80, 2048])]
    for size in sizes:
        title = f"{size / 1e6:.1f} MB"
        say(f"  {title}")
        body = memoryview(bytearray(os.urandom(size)))
        found = in_turns({name: rate(make, body) for name, make in HASHERS.items()}, 2 if quick else 11)
        for name, rates in found.items():
            spread = Spread.of([value / 1e9 for value in rates])
            label = title if name == next(iter(HASHERS)) else ""
            rows.append([label, name, str(spread), f"{size / spread.median / 1e6:.2f}"])
            series[name].append(spread.median)
    chart = Chart("bars", "Digest of a body", "GB for a processor second", [f"{s / 1e6:.1f} MB" for s in sizes], series)
    return Outcome([Grid("The digest of a body", ["", "", "GB/s (quartiles)", "ms a body"], rows)], chart)
