"""Callers of a fleet under chaos: those of one service, through the proxy and without it, and those of keys."""

import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import Final

import httpx

from prefix_service.client import PrefixClient
from tests.chaos.campaign import has_status, settled
from tests.chaos.fleet.fleet import Fleet, Replica
from tests.chaos.service import code_of, now
from tests.chaos.truth import SHAPE, Adapter, Truth, content
from tests.chaos.work import Acknowledged, Callers, key_values_of
from tests.processes import eventually

BETWEEN: Final = 0.1  # seconds between two requests of one caller
_KEYS: Final = 4
"""Keys that are valid at a time, and revoked ones that are tried."""
_TENANT: Final = "kept"
_RESIDENT: Final = f"/v1/tenants/{_TENANT}/adapters/resident"
_REVOKED_WITHIN: Final = 33.0  # seconds, with PostgreSQL away, and a second or two until its absence is noticed


@dataclass
class Keys:
    """Keys of a tenant by their ids: those that were acknowledged, and when the revocation of others was."""

    valid: dict[str, str] = field(default_factory=dict)
    revoked: dict[str, tuple[str, float]] = field(default_factory=dict)
    longest: float = 0
    """Seconds after which a revoked key was still accepted."""


class FleetWork(Callers):
    """The 16 callers of a fleet. Threads that read what is in memory of every replica, where nobody changes it, and
    with keys that come and go, ask replicas directly.
    """

    def __init__(self, fleet: Fleet, truth: Truth, between: float = BETWEEN) -> None:
        super().__init__(fleet, truth, between)
        self.fleet = fleet
        self.keys = Keys()
        self._key_changes = threading.Lock()
        self._writing.append(self._key_changes)
        self._resident = content(0)
        self.refusals: list[tuple[float, str]] = []
        """When replicas that run refused what they have in memory, and why."""

    def prepare(self) -> None:
        """Publishes what stays in memory, and pins it in that of every replica."""
        files = {"adapter_config.json": SHAPE.config, "adapter_model.safetensors": self._resident.file}
        with self.fleet.client(timeout=30) as client:
            client.post(f"{_RESIDENT}/versions", files=files).raise_for_status()
        for replica in self.fleet.replicas:
            self.pin(replica)

    def pin(self, replica: Replica) -> None:
        """Pins what stays in memory, and reads it once: a replica that was started again has nothing, and one that has
        just lost its connections may refuse for a moment.
        """
        with self.fleet.client_of(replica, timeout=30) as client:
            pinning = {"pinned": True}
            eventually(lambda: client.put(f"{_RESIDENT}@1/residency", json=pinning).status_code == 200)
            eventually(lambda: client.get(f"{_RESIDENT}@1/prefix?layout=stacked").status_code == 200)

    def loops(self) -> list[Callable[[], None]]:
        """Returns what the callers do until they are stopped."""
        addresses = [each.url for each in self.fleet.replicas]
        clients: list[tuple[str | list[str], bool]] = [
            (self.fleet.url, False),
            (self.fleet.url, True),
            (addresses, False),
            (addresses, True),
        ]
        workers = [partial(self._read_as_worker, url, watches) for url, watches in clients]
        direct: list[Callable[[], httpx.Client]] = [partial(self.fleet.client_of, each) for each in self.fleet.replicas]
        resident = [partial(self._read_resident, each) for each in (self.fleet.client, *direct)]
        return [*super().loops(), *[self._read_raw] * 2, *workers, *resident, self._change_keys, self._use_keys]

    def _read_as_worker(self, url: str | list[str], watches: bool) -> None:
        with PrefixClient(url, self.fleet.key, timeout=10, cache_bytes=1 << 18) as client:
            if watches:
                client.watch()
            self.read_by(client, Random(0))  # noqa: S311 - any order will do

    def _read_resident(self, connect: Callable[[], httpx.Client]) -> None:
        """Reads what every replica has in memory, from one of them or through the proxy."""
        with connect() as client:
            while not self._stop.wait(self._between):
                started = now()
                try:
                    answer = client.get(f"{_RESIDENT}@1/prefix?layout=stacked")
                except httpx.TransportError as error:
                    self.refusals.append((started, type(error).__name__))
                    continue
                if answer.status_code != 200:
                    self.refusals.append((started, code_of(answer)))
                elif key_values_of(answer.content) != self._resident.key_values:
                    self.truth.wrong.append(f"{_RESIDENT}@1: {answer.headers}")

    def moved(self, adapter: Adapter, alias: str, version: int, done: Acknowledged) -> None:
        """Reads the alias at another replica, which must know of the move that it is told of."""
        revision = done.answer.headers.get("prefix-revision")
        if revision is None:  # the catalog went away in between, or the answer was a 412
            return
        replica = Random(version).choice(self.fleet.replicas)  # noqa: S311 - any will do
        with self.fleet.client_of(replica) as client, contextlib.suppress(httpx.TransportError):
            answer = client.get(f"{adapter.path}@{alias}/prefix", headers={"Prefix-Min-Revision": revision})
            if answer.status_code == 404 or answer.headers.get("prefix-version", str(version)) != str(version):
                self.truth.lost.append(
                    f"{adapter.path}@{alias} at {replica.name} after its move to {version}: {answer}"
                )

    def _change_keys(self) -> None:
        """Makes keys, and revokes the oldest."""
        path = f"/v1/tenants/{_TENANT}/keys"
        with self.fleet.client() as client:
            while not self._stop.wait(5 * self._between):
                self._may_write.wait()
                with self._key_changes:
                    if not self._may_write.is_set():  # `quiet` has begun in between
                        continue
                    send = partial(client.post, path, json={"scope": "read", "name": "chaos"})
                    if (made := self._until_acknowledged(send, 201)) is not None:
                        key = made.answer.json()
                        self.keys.valid[key["id"]] = key["key"]
                    if len(self.keys.valid) > _KEYS:
                        oldest = next(iter(self.keys.valid))
                        text = self.keys.valid.pop(oldest)
                        if self._until_acknowledged(partial(client.delete, f"{path}/{oldest}"), 204, 404) is not None:
                            self.keys.revoked[oldest] = (text, now())
                        while len(self.keys.revoked) > _KEYS:
                            del self.keys.revoked[next(iter(self.keys.revoked))]

    def _use_keys(self) -> None:
        """Reads with valid and revoked keys at all replicas."""
        random = Random(1)  # noqa: S311 - any order will do
        while not self._stop.wait(self._between):
            keys = [*self.keys.valid.values(), *(text for text, _ in list(self.keys.revoked.values()))]
            replica = random.choice(self.fleet.replicas)
            if keys:
                with self.fleet.client_of(replica) as client:
                    self._use_key(client, random.choice(keys))

    def _use_key(self, client: httpx.Client, key: str) -> None:
        started = now()
        was_valid = key in self.keys.valid.values()
        try:
            answer = client.get(f"{_RESIDENT}@1/prefix", headers={"Authorization": f"Bearer {key}"})
        except httpx.TransportError:  # no caller of the fleet depends on one replica
            return
        if answer.status_code == 401 and was_valid and key in self.keys.valid.values():
            self.truth.lost.append(f"a key that was made is unknown to {client.base_url}: {answer.text}")
        revoked = dict(self.keys.revoked.values()).get(key)
        if answer.status_code == 200 and revoked is not None and started > revoked:
            self.keys.longest = max(self.keys.longest, started - revoked)
            if started - revoked > _REVOKED_WITHIN:
                self.truth.lost.append(f"a key is accepted {started - revoked:.1f} s after it was revoked")

    def compare_keys(self, client: httpx.Client) -> None:
        """Compares keys that were made and revoked with what a replica knows of them."""
        for text in self.keys.valid.values():
            self._compare_key(client, text, 200)
        for text, _ in self.keys.revoked.values():
            self._compare_key(client, text, 401)

    def _compare_key(self, client: httpx.Client, key: str, expected: int) -> None:
        path = f"{_RESIDENT}@1/prefix?layout=stacked"
        answer = settled(client, path, partial(has_status, expected), Authorization=f"Bearer {key}")
        if answer.status_code != expected:
            self.truth.lost.append(f"a key must answer {expected} at {client.base_url}: {answer.status_code}")
