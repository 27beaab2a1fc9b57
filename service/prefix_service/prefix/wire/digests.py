"""Digests of a body in the fields `Repr-Digest` and `Want-Repr-Digest` (RFC 9530).

CRC-32C detects damage in transit at a twentieth of SHA-256's cost. It is no defence against an attacker; TLS is.
CPython has no CRC-32C; AWS's common runtime is the fastest of the libraries that tests/benchmarks/speed compares.
"""

import base64
import hashlib
from collections.abc import Mapping
from functools import lru_cache
from typing import Final, Literal, Protocol, get_args

Algorithm = Literal["sha-256", "crc32c"]

Data = bytes | bytearray | memoryview

_ALGORITHMS: Final[tuple[Algorithm, ...]] = get_args(Algorithm)
_LENGTHS: Final[Mapping[Algorithm, int]] = {"sha-256": 32, "crc32c": 4}


class Hasher(Protocol):
    """The part of a `hashlib` object's interface that is used here."""

    def update(self, data: Data, /) -> object:
        """Adds the next bytes."""

    def digest(self) -> bytes:
        """Returns the digest of all bytes so far."""


class Crc32c:
    """CRC-32C (Castagnoli); its digest is four bytes, most significant first."""

    def __init__(self) -> None:
        # Loads a native library, which commands without tensors do not need.
        from awscrt.checksums import combine_crc32c, crc32c

        self._compute, self._combine = crc32c, combine_crc32c
        self._value = 0

    def update(self, data: Data, /) -> None:
        """Adds the next bytes."""
        self._value = self._compute(data, self._value)

    def repeat(self, data: Data, times: int, /) -> None:
        """Adds `data` `times` times; reads it once."""
        value, length = 0, len(data)
        for at in range(0, length, 1 << 20):  # a call holds the GIL
            value = self._compute(data[at : at + (1 << 20)], value)
        while times:  # `value` is the checksum of 1, 2, 4, … repetitions
            if times & 1:
                self._value = self._combine(self._value, value, length)
            value, length, times = self._combine(value, value, length), 2 * length, times >> 1

    def digest(self) -> bytes:
        """Returns the checksum of all bytes so far."""
        return self._value.to_bytes(4, "big")


def new_hasher(algorithm: Algorithm) -> Hasher:
    """Returns a hasher that has seen no bytes."""
    return hashlib.sha256() if algorithm == "sha-256" else Crc32c()


def digest_of(algorithm: Algorithm, body: Data) -> bytes:
    """Returns the digest of a whole body."""
    hasher = new_hasher(algorithm)
    hasher.update(body)
    return hasher.digest()


def wanted_algorithm(want_repr_digest: str) -> Algorithm | None:
    """Returns the algorithm with the highest preference in a `Want-Repr-Digest` field, SHA-256 among equals.

    Returns None if the field names neither algorithm, or excludes both with preference 0. Unknown algorithms are
    ignored, as RFC 9530 requires.
    """
    preferences = dict.fromkeys(_ALGORITHMS, 0)
    for member in want_repr_digest.split(","):
        name, _, value = (part.strip() for part in member.partition("="))
        for algorithm in _ALGORITHMS:
            if name.lower() == algorithm:
                # A bare name is the boolean "true" of structured fields: wanted, without a preference.
                preferences[algorithm] = int(value) if value.isascii() and value.isdigit() and len(value) < 3 else 1
    best = max(_ALGORITHMS, key=preferences.__getitem__)
    return best if preferences[best] else None


def format_digest(algorithm: Algorithm, digest: bytes) -> str:
    """Returns the value of a `Repr-Digest` field."""
    return f"{algorithm}=:{base64.b64encode(digest).decode()}:"


@lru_cache(maxsize=64)  # one answer's digests are parsed several times
def parse_digests(repr_digest: str) -> Mapping[Algorithm, bytes]:
    """Returns the digests in a `Repr-Digest` field, by algorithm. Ignores members that are malformed or unknown."""
    found: dict[Algorithm, bytes] = {}
    for member in repr_digest.split(","):
        name, _, value = member.strip().partition("=")
        for algorithm in _ALGORITHMS:
            if name != algorithm or len(value) < 2 or (value[0], value[-1]) != (":", ":"):
                continue
            try:
                digest = base64.b64decode(value[1:-1], validate=True)
            except ValueError:  # also of characters that are not ASCII
                continue
            if len(digest) == _LENGTHS[algorithm]:
                found[algorithm] = digest
    return found
