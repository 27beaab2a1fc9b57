"""Records what a service under chaos has acknowledged, and decides what each answer must therefore be."""

import hashlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Final

from tests.benchmarks.fleet import Shape

SHAPE: Final = Shape(layers=4, heads=2, head_dim=32, tokens=16)


@dataclass(frozen=True, slots=True)
class Content:
    """The content of an upload: the weights file, its SHA-256, and the SHA-256 of the keys and values that follow from
    it, computed by an encoder that is not the service's.
    """

    seed: int
    weights: str
    key_values: str

    @property
    def file(self) -> bytes:
        """Makes the weights file again."""
        return SHAPE.weights(self.seed)[0]


def content(seed: int) -> Content:
    """Returns the content of a seed."""
    file, key_values = SHAPE.weights(seed)
    return Content(seed, hashlib.sha256(file).hexdigest(), key_values)


@dataclass(slots=True)
class Adapter:
    """An adapter that a single owner changes."""

    tenant: str
    name: str
    versions: dict[int, Content] = field(default_factory=dict)
    attempted: dict[str, Content] = field(default_factory=dict)  # by digest of keys and values
    leaving: set[int] = field(default_factory=set)  # whose deletion was asked for, acknowledged or not
    aliases: dict[str, int] = field(default_factory=dict)
    doubtful: dict[str, set[int]] = field(default_factory=dict)  # from where a try to move an alias may be under way
    spared: set[int] = field(default_factory=set)  # that a fault has in its hands

    @property
    def path(self) -> str:
        """Returns the adapter's path in the API."""
        return f"/v1/tenants/{self.tenant}/adapters/{self.name}"

    @property
    def deletable(self) -> list[int]:
        """Returns the versions, except the newest, that no alias names and no fault uses."""
        kept = {*self.aliases.values(), *self.spared, max(self.versions, default=0)}
        return [version for version in self.versions if version not in kept and version not in self.leaving]


class Truth:
    """The journal of acknowledged changes, and the answers that contradict it. Threads can share it."""

    def __init__(self, tenants: int = 2, adapters: int = 3) -> None:
        self.lock = threading.RLock()
        self.owned = [[Adapter(f"tenant-{t}", f"adapter-{a}") for a in range(adapters)] for t in range(tenants)]
        self.acknowledged = 0
        self.wrong: list[str] = []
        self.lost: list[str] = []

    def adapters(self) -> Iterator[Adapter]:
        """Yields every adapter of every owner."""
        for owned in self.owned:
            yield from owned

    def anything(self, random: Random) -> tuple[Adapter, int] | None:
        """Returns an acknowledged version that is not being deleted, if there is one."""
        with self.lock:
            found = [
                (adapter, version)
                for adapter in self.adapters()
                for version in adapter.versions
                if version not in adapter.leaving
            ]
        return random.choice(found) if found else None

    def add_version(self, adapter: Adapter, number: int, published: Content) -> None:
        """Notes an acknowledged version, whose number must be a new one."""
        with self.lock:
            if number <= max(adapter.versions, default=0):
                self.wrong.append(f"{adapter.path}@{number}: the number is used twice")
            adapter.versions[number] = published

    def check_prefix(self, adapter: Adapter, version: int | None, digest: str) -> None:
        """Compares a prefix that was read with the published one, of this version or of any of the adapter."""
        with self.lock:
            expected = None if version is None else adapter.versions.get(version)
            right = digest in adapter.attempted if expected is None else digest == expected.key_values
        if not right:
            self.wrong.append(f"{adapter.path}@{version}: keys and values {digest}")

    def check_parameters(self, adapter: Adapter, version: int, file: bytes) -> None:
        """Compares a weights file that was read with the published one."""
        if hashlib.sha256(file).hexdigest() != adapter.versions[version].weights:
            self.wrong.append(f"{adapter.path}@{version}: parameters")

    def check_missing(self, adapter: Adapter, version: int, why: str) -> None:
        """Counts an acknowledged version that the service denies, unless its deletion was asked for."""
        with self.lock:
            if version in adapter.versions and version not in adapter.leaving:
                self.lost.append(f"{adapter.path}@{version}: {why}")
