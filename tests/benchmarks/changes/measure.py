"""Measures how soon the replicas of a fleet follow a change, and what requests cost PostgreSQL."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from random import Random
from typing import Final

import httpx

from prefix_service.client import PrefixClient
from tests.api.helpers import upload, weights
from tests.benchmarks.statements import counted
from tests.client.forwarder import Forwarder
from tests.fleet.starting import Engines, Fleet
from tests.processes import eventually

_TENANT: Final = "acme"
_ADAPTER: Final = f"/v1/tenants/{_TENANT}/adapters/a"
_PAUSE: Final = 1.0
"""A replica looks once a second: changes come at any moment of it."""


@dataclass(slots=True)
class Followed:
    """Seconds from the acknowledgement of a change until the last replica followed it, one for each change."""

    moves: list[float] = field(default_factory=list)
    revocations: list[float] = field(default_factory=list)


@dataclass(slots=True)
class Written:
    """Reads of another replica after a change, with its revision: the seconds of each, and how many were not right."""

    seconds: list[float] = field(default_factory=list)
    stale: int = 0
    refused: int = 0


@dataclass(slots=True)
class Watched:
    """Moves that a watching client was told of: seconds from the acknowledgement until then, and the requests that its
    first read of the new version sent."""

    seconds: list[float] = field(default_factory=list)
    cold: int = 0


@dataclass(frozen=True, slots=True)
class Cost:
    """Requests and PostgreSQL's statements, in a second, of all replicas; and each statement, by its first words."""

    requests: float
    statements: float
    sent: Mapping[str, float]


class Measuring:
    """A fleet with one adapter of two versions, and a client of each replica."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self.servers = [fleet.servers[number] for number in sorted(fleet.servers)]
        self._admins = [server.client(fleet.admin_key) for server in self.servers]
        self._random = Random(0)  # noqa: S311 - a benchmark's draw
        for seed in range(2):
            assert upload(self._admins[0], _TENANT, "a", file=weights(seed)).status_code == 201
        self._version = 1
        self.move()
        self._reach_all()

    def move(self) -> httpx.Response:
        """Moves the alias to the other of the first two versions, at any of the replicas."""
        return self._move_to(1 if self._version == 2 else 2)

    def _move_to(self, version: int) -> httpx.Response:
        self._version = version
        path = f"{_ADAPTER}/aliases/prod"
        return self._random.choice(self._admins).put(path, json={"version": version}).raise_for_status()

    def _reach_all(self) -> None:
        for admin in self._admins:
            eventually(lambda admin=admin: self._is_moved(admin))  # type: ignore[misc]

    def _is_moved(self, client: httpx.Client) -> bool:
        answer = client.get(f"{_ADAPTER}@prod/prefix").raise_for_status()
        return answer.headers["prefix-version"] == str(self._version)

    def _last(self, clients: Sequence[httpx.Client], follows: Callable[[httpx.Client], bool]) -> float:
        """Returns the seconds from now until all replicas follow, asked again and again."""
        acknowledged = time.monotonic()
        with ThreadPoolExecutor(len(clients)) as pool:
            list(pool.map(lambda client: eventually(lambda: follows(client)), clients))
        return time.monotonic() - acknowledged

    def followed(self, changes: int) -> Followed:
        """Moves the alias, and revokes keys, so many times each."""
        found = Followed()
        for _ in range(changes):
            time.sleep(self._random.uniform(0, _PAUSE))
            self.move()
            found.moves.append(self._last(self._admins, self._is_moved))
            found.revocations.append(self._revoked())
        return found

    def _revoked(self) -> float:
        path = f"/v1/tenants/{_TENANT}/keys"
        made = self._admins[0].post(path, json={"scope": "read"}).raise_for_status().json()
        workers = [server.client(made["key"]) for server in self.servers]
        for worker in workers:  # which remembers the key then
            eventually(lambda worker=worker: worker.get(f"{_ADAPTER}@prod/prefix").status_code == 200)  # type: ignore[misc]
        time.sleep(self._random.uniform(0, _PAUSE))
        self._random.choice(self._admins).delete(f"{path}/{made['id']}").raise_for_status()
        seconds = self._last(workers, lambda worker: worker.get(f"{_ADAPTER}@prod/prefix").status_code == 401)
        for worker in workers:
            worker.close()
        return seconds

    def written(self, changes: int) -> Written:
        """Reads at every replica right after a move, with the move's revision."""
        found = Written()
        for _ in range(changes):
            headers = {"Prefix-Min-Revision": self.move().headers["Prefix-Revision"]}
            for admin in self._admins:
                began = time.monotonic()
                answer = admin.get(f"{_ADAPTER}@prod/prefix", headers=headers)
                found.seconds.append(time.monotonic() - began)
                found.refused += answer.status_code != 200
                found.stale += answer.headers.get("prefix-version", str(self._version)) != str(self._version)
        return found

    def watched(self, changes: int) -> Watched:
        """Moves the alias to new versions for a watching client that uses it, and counts the requests of its next
        read.
        """
        found, moved = Watched(), threading.Event()
        with ExitStack() as stack:
            addresses = [Forwarder(server.url) for server in self.servers]
            for each in addresses:
                stack.callback(each.leave)
            urls = [each.url for each in addresses]
            with PrefixClient(urls, self._fleet.admin_key) as client:
                watch = client.watch(lambda change: moved.set() if change.kind == "alias-moved" else None)
                eventually(lambda: watch.is_alive)
                client.get(f"{_TENANT}/a@prod")
                for seed in range(2, 2 + changes):
                    published = upload(self._random.choice(self._admins), _TENANT, "a", file=weights(seed))
                    time.sleep(self._random.uniform(0, _PAUSE / 4))
                    moved.clear()
                    self._move_to(published.raise_for_status().json()["version"])
                    acknowledged = time.monotonic()
                    if not moved.wait(60):
                        raise RuntimeError("a watching client was not told of a move within a minute")
                    found.seconds.append(time.monotonic() - acknowledged)
                    for each in addresses:
                        each.taken()
                    if client.get(f"{_TENANT}/a@prod").version != self._version:
                        raise RuntimeError("a watching client has an old version after it was told of a move")
                    found.cold += sum(each.taken() for each in addresses)
        return found

    def cost(self, engines: Engines, seconds: float, *, under_load: bool) -> Cost:
        """Returns what the replicas cost while nobody asks them, or while workers read what is in memory."""
        requests = [0] * len(self.servers)
        stop = threading.Event()

        def read(number: int) -> None:
            while not stop.is_set():
                self._is_moved(self._admins[number])
                requests[number] += 1

        threads = [threading.Thread(target=read, args=(number,)) for number in range(len(requests)) if under_load]
        with counted(engines.postgresql) as statements:
            for thread in threads:
                thread.start()
            time.sleep(seconds)
            stop.set()
            for thread in threads:
                thread.join()
        sent = {text: count / seconds for text, count in statements.items()}
        return Cost(sum(requests) / seconds, sum(sent.values()), sent)
