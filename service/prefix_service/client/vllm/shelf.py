"""The prefixes in the workers' host memory, those on their way there, and those that wait for a turn. Pure state.

The scheduler keeps this account, since it alone knows which requests wait; the workers carry out its orders. A request
gets blocks of vLLM's cache only when every worker has the bytes, so a slow fetch holds no blocks.
"""

import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from prefix_service.client.vllm.requests import References
from prefix_service.client.vllm.tally import HOST, Tally
from prefix_service.client.vllm.turns import Share, Turns
from prefix_service.errors import OutOfSpace, PrefixServiceError

_FETCHES: Final = 32  # in parallel on each worker; fetches wait for a network, not for a thread


@dataclass(frozen=True, slots=True)
class Load:
    """Orders the workers to write positions `start` to `end` of a parcel into a request's blocks, or, without a parcel,
    to report the request as failed. `block_ids` has the blocks of each of vLLM's groups of layers."""

    request_id: str
    parcel: int | None
    start: int = 0
    end: int = 0
    block_ids: Sequence[Sequence[int]] = ()


@dataclass(frozen=True, slots=True)
class Orders:
    """The workers' tasks in a step, in this order: load, drop, fetch, begin early, give up. Parcels and early fetches
    have numbers, each of which is used once."""

    loads: Sequence[Load] = ()
    drops: Sequence[int] = ()
    fetches: Sequence[tuple[int, References, int | None]] = ()
    """The number of each parcel, the references of its versions, and the number of the early fetch that may have them
    already."""
    early: Sequence[tuple[int, References]] = ()
    """Fetches that begin while the service is asked which versions these references mean."""
    given_up: Sequence[int] = ()
    """Early fetches that nobody needs."""


@dataclass(slots=True)
class Reports:
    """The parcels that arrived since the last step, and on how many workers; those that failed, and why; and the
    requests into whose blocks a worker could not write its parcel, and why."""

    arrived: dict[int, int] = field(default_factory=dict)
    failed: dict[int, PrefixServiceError] = field(default_factory=dict)
    unwritten: dict[str, PrefixServiceError] = field(default_factory=dict)

    def aggregate(self, other: "Reports") -> "Reports":
        """Returns the reports of two groups of workers as one."""
        for number, count in other.arrived.items():
            self.arrived[number] = self.arrived.get(number, 0) + count
        self.failed.update(other.failed)
        self.unwritten.update(other.unwritten)
        return self


@dataclass(slots=True, eq=False)
class Parcel:
    """The bytes of a composition, `nbytes` on each worker, and the requests that need them."""

    number: int
    tenant: str
    references: References
    nbytes: int
    missing: int
    """The number of workers that have not reported it."""
    users: set[str] = field(default_factory=set)
    since: float = field(default_factory=time.monotonic)
    has_begun: bool = False
    early: int | None = None
    """The number of the early fetch that may have its bytes already."""
    error: PrefixServiceError | None = None

    @property
    def is_here(self) -> bool:
        """Whether every worker has the bytes."""
        return not self.missing


class Shelf:
    """Parcels of at most `budget` bytes on each of the `workers`. Parcels that no request needs are kept while there is
    room, and leave least recently used first."""

    def __init__(self, budget: int, workers: int, tally: Tally) -> None:
        self._budget, self._workers, self._tally = budget, workers, tally
        self._slots, self._bytes = Share(_FETCHES), Share(budget)
        self._waiting = Turns[Parcel]()
        self._by_references: dict[References, Parcel] = {}
        self._by_number: dict[int, Parcel] = {}
        self._idle: OrderedDict[int, Parcel] = OrderedDict()
        self._idle_bytes = 0
        self._last_number = 0
        self._drops: list[int] = []
        self._may_begin = False  # whether anything has changed since the last try to begin one

    def want(self, request_id: str, tenant: str, references: References, nbytes: int) -> Parcel:
        """Returns the parcel of a composition, which stays until the request has called `leave`.

        Raises:
            OutOfSpace: it exceeds the whole budget.
        """
        parcel = self._by_references.get(references)
        if parcel is None:
            if nbytes > self._budget:
                raise OutOfSpace(
                    f"{', '.join(references)} has {nbytes} bytes on each worker, more than all of cache_bytes, "
                    f"{self._budget}: raise it in kv_connector_extra_config"
                )
            self._last_number += 1
            parcel = Parcel(self._last_number, tenant, references, nbytes, self._workers)
            self._by_references[references] = self._by_number[parcel.number] = parcel
            self._waiting.add(tenant, parcel)
            self._may_begin = True
        elif parcel.number in self._idle:
            del self._idle[parcel.number]
            self._idle_bytes -= parcel.nbytes
            self._bytes.take(parcel.tenant, parcel.nbytes)
        parcel.users.add(request_id)
        return parcel

    def leave(self, request_id: str, parcel: Parcel) -> None:
        """Notes that a request needs a parcel no longer; cancels a fetch that no request needs."""
        if request_id not in parcel.users:
            return
        parcel.users.remove(request_id)
        if parcel.users or parcel.error is not None:
            return
        self._may_begin = True
        if not parcel.has_begun:
            self._waiting.discard(parcel.tenant, parcel)
            self._forget(parcel)
            return
        self._bytes.give(parcel.tenant, parcel.nbytes)
        if parcel.is_here and self._by_references.get(parcel.references) is parcel:
            self._idle[parcel.number] = parcel
            self._idle_bytes += parcel.nbytes
            return
        if not parcel.is_here:
            self._slots.give(parcel.tenant, 1)
        self._drop(parcel)

    def take_orders(self, loads: Sequence[Load]) -> Orders:
        """Returns the orders of a step with these loads, and the drops and fetches that can begin now."""
        fetches = []
        if self._may_begin:
            self._may_begin = False
            for parcel in self._waiting.take(self._has_room):
                parcel.has_begun = True
                self._slots.take(parcel.tenant, 1)
                self._bytes.take(parcel.tenant, parcel.nbytes)
                while self._bytes.taken + self._idle_bytes > self._budget:
                    self._drop_idle(next(iter(self._idle.values())))
                fetches.append((parcel.number, parcel.references, parcel.early))
        drops, self._drops = self._drops, []
        return Orders(loads, drops, fetches)

    def _has_room(self, parcel: Parcel) -> bool:
        return self._slots.has_room(parcel.tenant, 1) and self._bytes.has_room(parcel.tenant, parcel.nbytes)

    def take_reports(self, reports: Reports) -> None:
        """Notes the workers' reports; ignores parcels that were cancelled."""
        for number, error in reports.failed.items():
            self._fail(number, error)
        for number, count in reports.arrived.items():
            parcel = self._by_number.get(number)
            if parcel is not None:
                parcel.missing -= count
                if parcel.is_here:
                    self._slots.give(parcel.tenant, 1)
                    self._may_begin = True
                    self._tally.load(parcel.references, HOST)
                    self._tally.add_load(time.monotonic() - parcel.since, parcel.nbytes * self._workers)

    def _fail(self, number: int, error: PrefixServiceError) -> None:
        parcel = self._by_number.get(number)
        if parcel is not None:
            parcel.error = error
            self._slots.give(parcel.tenant, 1)
            self._bytes.give(parcel.tenant, parcel.nbytes)
            self._drop(parcel)
            self._may_begin = True

    def forget(self) -> None:
        """Drops parcels that no request needs, and the others once their requests leave; new requests fetch again."""
        for parcel in list(self._idle.values()):
            self._drop_idle(parcel)
        self._by_references.clear()

    def _drop_idle(self, parcel: Parcel) -> None:
        del self._idle[parcel.number]
        self._idle_bytes -= parcel.nbytes
        self._drop(parcel)

    def _drop(self, parcel: Parcel) -> None:
        self._drops.append(parcel.number)
        if parcel.is_here:
            self._tally.unload(parcel.references, HOST)
        self._forget(parcel)

    def _forget(self, parcel: Parcel) -> None:
        del self._by_number[parcel.number]
        if self._by_references.get(parcel.references) is parcel:
            del self._by_references[parcel.references]
