"""One service at several addresses: each request goes to the address that its adapter belongs to, and to the next one
where that is away or slow.

The adapter's address is found by rendezvous hashing of `tenant/adapter`, without version and form. All clients with the
same addresses choose the same one, so all forms of an adapter are warm in one place, and when an address comes or goes
only its own adapters move. Any address can serve any adapter.
"""

import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from hashlib import blake2b
from random import choice
from typing import Final

from prefix_service.client.protocol import Request
from prefix_service.client.transport.connection import Connection, NotConnected
from prefix_service.client.transport.dialling import time_left
from prefix_service.client.transport.hedging import Hedging
from prefix_service.client.transport.http1 import Head
from prefix_service.client.transport.link import MOST_UNDECLARED, AllocateBody, Observer
from prefix_service.client.transport.pool import Interrupt, Pool

_FIRST_ABSENCE: Final = 1.0  # seconds that an address counts as away after one failure; each further one doubles it
_LONGEST_ABSENCE: Final = 30.0
_PATIENCE: Final = 0.25
"""The share of the remaining time in which an address must send the first byte of an answer while there are others."""
_MOST_PATIENCE: Final = 60.0  # seconds
_CONNECTS: Final = 2.0  # seconds in which an address must be connected while there are others
_ELSEWHERE: Final = (502, 503, 504)
"""The statuses of an answer that another address may give better."""
_ADAPTER: Final = re.compile(r"/v1/tenants/([^/]+)/adapters/([^/@]+)")


class Place:
    """One address of a service: its pool, and whether it was away when it was last tried."""

    def __init__(self, connection: Connection, name: str) -> None:
        self.name, self.pool = name, Pool(connection)
        self.failures = 0  # since the latest answer
        self.away_until = self.heard_at = -math.inf

    def begins(self) -> None:
        """Notes that an answer began to arrive."""
        self.failures, self.away_until, self.heard_at = 0, -math.inf, time.monotonic()

    def fails(self) -> None:
        """Notes a failure: the address counts as away for a while."""
        self.failures += 1
        self.away_until = time.monotonic() + self._absence

    def probe(self) -> None:
        """Keeps other requests away while one finds out whether the address is back."""
        self.away_until = time.monotonic() + self._absence

    @property
    def _absence(self) -> float:
        return min(_FIRST_ABSENCE * 2.0 ** min(self.failures - 1, 10), _LONGEST_ABSENCE)


class Pools:
    """Exchanges with one service at several addresses. It can be shared between threads, and with forked children.

    `connections` are named: the names decide which adapters belong to an address.
    """

    def __init__(self, connections: Mapping[str, Connection]) -> None:
        self._places = [Place(connection, name) for name, connection in connections.items()]
        self._hedging = Hedging()
        self._ranked = lru_cache(4096)(self._rank)

    @property
    def away(self) -> list[str]:
        """The names of the addresses that did not answer when they were last tried."""
        return [place.name for place in self._places if place.failures]

    def exchange(
        self,
        request: Request,
        allocate: AllocateBody,
        until: float,
        interrupt: Interrupt,
        *,
        headers: Mapping[str, str] | None = None,
        observe: Observer | None = None,
        most: int = MOST_UNDECLARED,
    ) -> tuple[Head, memoryview]:
        """Sends a request; returns head and body of its answer before the time `until` of `time.monotonic`.

        A GET goes on to the next address if one does not answer, or says that it cannot; a change does so only if no
        part of it was sent.

        Raises:
            OSError: the answer is missing or incomplete.
            InvalidResponse: another catalog answered than before.
        """
        for attempt in self._attempts(request, until, interrupt):
            exchange = attempt.place.pool.exchange
            with attempt:
                attempt.answer = exchange(
                    request, allocate, until, interrupt, headers=headers, observe=observe, most=most, race=attempt.race
                )
            if attempt.is_last:
                break
        return attempt.result()

    async def exchange_on_loop(
        self,
        request: Request,
        allocate: AllocateBody,
        until: float,
        *,
        headers: Mapping[str, str] | None = None,
        observe: Observer | None = None,
        most: int = MOST_UNDECLARED,
    ) -> tuple[Head, memoryview]:
        """Sends a GET on the running event loop, and goes on to the next address as `exchange` does.

        Raises:
            OSError: the answer is missing or incomplete.
            InvalidResponse: another catalog answered than before.
        """
        for attempt in self._attempts(request, until, Interrupt()):
            exchange = attempt.place.pool.exchange_on_loop
            with attempt:
                attempt.answer = await exchange(
                    request, allocate, until, headers=headers, observe=observe, most=most, race=attempt.race
                )
            if attempt.is_last:
                break
        return attempt.result()

    def _attempts(self, request: Request, until: float, interrupt: Interrupt) -> Iterator["_Attempt"]:
        places = self._order(request)
        for index, place in enumerate(places):
            time_left(until)
            others = places[index + 1 :]
            race = _Race(place, others, until, self._hedging) if request.method == "GET" and others else None
            yield _Attempt(place, race, interrupt, is_read=request.method == "GET", has_others=bool(others))

    def _order(self, request: Request) -> Sequence[Place]:
        """Returns the addresses in the order in which they are tried: first those that are there, the adapter's own
        before the others. An address that was away is tried again by one GET at a time, of an adapter of its own."""
        ranked = self._ranked(affinity(request.path))
        if not any(place.failures for place in ranked):
            return ranked
        now = time.monotonic()
        there: list[Place] = []
        for place in ranked:
            if not place.failures:
                there.append(place)
            elif place.away_until <= now and not there and request.method == "GET":
                place.probe()
                there.append(place)
        return there + sorted((place for place in ranked if place not in there), key=lambda place: place.away_until)

    def _rank(self, key: str) -> Sequence[Place]:
        return tuple(sorted(self._places, key=lambda place: score(key, place.name), reverse=True))

    def any(self, avoided: Pool | None = None) -> Pool:
        """Returns the pool to any address that is there, another than `avoided` if possible: streams are no adapter's,
        so that chance spreads them best."""
        places = [place for place in self._places if place.pool is not avoided] or self._places
        there = [place for place in places if not place.failures] or places
        return choice(there).pool  # noqa: S311 - it spreads load

    def replace(self, connections: Mapping[str, Connection]) -> None:
        """Goes on with other addresses; what is known of those that stay is kept."""
        before = {place.name: place for place in self._places}
        self._places = [
            before[name] if name in before else Place(connection, name) for name, connection in connections.items()
        ]
        self._ranked.cache_clear()
        for name in before.keys() - connections.keys():
            before[name].pool.close()

    def close(self) -> None:
        """Closes every connection."""
        for place in self._places:
            place.pool.close()


def affinity(path: str) -> str:
    """Returns what decides the address of a request: its adapter as `tenant/adapter`, without one its path."""
    found = _ADAPTER.match(path)
    return path if found is None else f"{found[1]}/{found[2]}"


def score(key: str, name: str) -> bytes:
    """Returns the score of an address for a key; the highest wins (Thaler and Ravishankar, 1998)."""
    return blake2b(f"{name}\n{key}".encode(), digest_size=8).digest()


class _Attempt:
    """A request at one address, with the addresses after it; as a context manager it keeps the error that ends it, if
    the next address may be tried."""

    def __init__(
        self, place: Place, race: "_Race | None", interrupt: Interrupt, *, is_read: bool, has_others: bool
    ) -> None:
        self.place, self.race = place, race
        self.answer: tuple[Head, memoryview] | None = None
        self._interrupt, self._is_read, self._has_others = interrupt, is_read, has_others
        self._error: OSError | None = None

    @property
    def is_last(self) -> bool:
        """Whether the answer or the error is final."""
        if self.answer is None:
            return not self._has_others
        return not (self._has_others and self._is_read and self.answer[0].status in _ELSEWHERE)

    def result(self) -> tuple[Head, memoryview]:
        """Returns the answer.

        Raises:
            OSError: there is none.
        """
        if self.answer is None:
            raise self._error or OSError("there is no address")
        return self.answer

    def __enter__(self) -> None:
        pass

    def __exit__(self, _type: object, error: BaseException | None, _trace: object) -> bool:
        """Returns whether another address may be tried instead of raising the error."""
        place = self.place if self.race is None else self.race.winner or self.place
        if error is None:
            if self.answer is not None and _is_proxys(self.answer[0]):
                place.fails()
            else:
                place.begins()
            return False
        has_begun = self.race is not None and self.race.has_begun
        if not isinstance(error, OSError) or has_begun or self._interrupt.is_broken:
            return False
        place.fails()
        self._error = error
        return isinstance(error, NotConnected) or self._is_read


def _is_proxys(head: Head) -> bool:
    """Returns whether something in front of the service answered that the service is not there."""
    return head.status in _ELSEWHERE and not head.headers.get("content-type", "").startswith("application/problem+json")


class _Race:
    """What a GET at one address may expect of it, and the address to ask beside it."""

    def __init__(self, place: Place, others: Sequence[Place], until: float, hedging: Hedging) -> None:
        self._began = time.monotonic()
        self._place, self._others, self._hedging = place, others, hedging
        self.winner: Place | None = None
        self.connected_by = min(self._began + _CONNECTS, until)
        self.first_by = self._began + min(_PATIENCE * (until - self._began), _MOST_PATIENCE)
        self.hedge_at = self._began + hedging.delay

    @property
    def has_begun(self) -> bool:
        """Whether an answer has begun to arrive."""
        return self.winner is not None

    def second(self) -> Pool | None:
        """Returns the pool to the next address that is there, if the budget allows it."""
        place = next((place for place in self._others if not place.failures), None)
        return place.pool if place is not None and self._hedging.take() else None

    def begins(self, pool: Pool) -> None:
        """Notes that an answer began to arrive over a pool. An address that lost, and has sent nothing to anybody since
        the request, counts as away."""
        self.winner = next(place for place in (self._place, *self._others) if place.pool is pool)
        self._hedging.observe(time.monotonic() - self._began)
        if self.winner is not self._place and self._place.heard_at < self._began:
            self._place.fails()
