"""Decides which requests and which work may begin: counts requests in flight, and budgets memory and processor time.

All code that allocates memory or computes for long, depending on a caller's input, asks here first in the name of the
tenant that pays for it. A refusal comes before the work and costs nothing.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Final, Literal, TypeVar, cast, get_args

from prefix_service.errors import OutOfSpace, Overloaded, PrefixServiceError
from prefix_service.registry.work_budget import Job, WorkBudget
from prefix_service.system.spans import span
from prefix_service.system.turns import Turns, in_thread

T = TypeVar("T")

Refusal = Literal["requests", "size", "memory"]
"""Why something was refused: too many requests in flight (`requests`), more memory than one request may take (`size`),
or too long a wait for memory (`memory`).
"""

PLATFORM: Final = "(the platform)"
"""The payer for requests of the platform's own keys outside tenants' adapters; no tenant's name has a space."""

PATIENCE: Final = 30.0
"""Seconds that work waits for memory before its request is refused."""

RESERVE: Final = 16
"""Requests that the platform's operators may have in flight when the process takes no others."""

_SLICE: Final = 0.25  # seconds after which a long computation gives its turn back
_STRANGERS: Final = 16
"""Requests in flight per one request that callers without a key may have, counted separately."""


class InFlight:
    """Counts requests in flight, in total and per tenant. Pure state."""

    def __init__(self, most: int, most_of_tenant: int) -> None:
        self.total = self.strangers = 0
        self.most, self._most_of_tenant = most, most_of_tenant
        self._most_strangers = max(1, most // _STRANGERS)
        self._of: dict[str, int] = {}

    @property
    def by_tenant(self) -> Mapping[str, int]:
        """The requests in flight of each tenant that has any."""
        return self._of

    def of(self, tenant: str) -> int:
        """Returns a tenant's requests in flight."""
        return self._of.get(tenant, 0)

    def begin(self, tenant: str | None, *, reserved: bool = False) -> None:
        """Counts a request.

        `tenant` is None if the request is for no tenant's adapters. `reserved` requests may also take the last
        `RESERVE` places of the process.

        Raises:
            Overloaded: there are too many in flight; the request is not counted.
        """
        if self.total >= self.most + (RESERVE if reserved else 0):
            raise Overloaded(f"{self.total} requests are in flight, the most that this process takes: try again")
        if tenant is not None:
            if (count := self.of(tenant)) >= self._most_of_tenant:
                raise Overloaded(
                    f"tenant {tenant!r} has {count} requests in flight, the most that one may have: try again"
                )
            self._of[tenant] = count + 1
        self.total += 1

    def begin_stranger(self) -> None:
        """Counts a request of a caller without a key, apart from all others. End it with `end_stranger`.

        Raises:
            Overloaded: there are too many in flight; the request is not counted.
        """
        if self.strangers >= self._most_strangers:
            raise Overloaded(
                f"{self.strangers} requests without a key are in flight, the most that this process takes: try again"
            )
        self.strangers += 1

    def end_stranger(self) -> None:
        """Ends a request that `begin_stranger` counted."""
        self.strangers -= 1

    def end(self, tenant: str | None) -> None:
        """Ends a request that `begin` counted."""
        self.total -= 1
        if tenant is not None:
            left = self._of.pop(tenant) - 1
            if left:
                self._of[tenant] = left


class Work:
    """A tenant's admitted work: `run` is for short calls, `compute` for long computations.

    Both have separate turns, so a short call never waits for a long computation.
    """

    def __init__(self, tenant: str, short: Turns, long: Turns) -> None:
        self._tenant, self._short, self._long = tenant, short, long

    async def run(self, call: Callable[[], T]) -> T:
        """Runs `call` in a thread, once it is the tenant's turn; returns its result."""
        return await self._short.run(self._tenant, call)

    async def compute(self, steps: Generator[None, None, T]) -> T:
        """Runs a generator's steps in threads, in the tenant's turns; returns the generator's return value.

        A turn ends with the first step that ends later than `_SLICE` seconds after the turn's beginning. If the caller
        is cancelled, it waits for the running step, and then the generator is closed.
        """
        try:
            while True:
                ended, value = await self._long.run(self._tenant, partial(_some_steps, steps))
                if ended:
                    return cast(T, value)
        except BaseException:
            await in_thread(steps.close)
            raise


def _some_steps(steps: Generator[None, None, T]) -> tuple[bool, T | None]:
    """Takes steps until a slice of time is over; returns whether the generator has ended, and its return value."""
    until = time.monotonic() + _SLICE
    try:
        while True:
            next(steps)
            if time.monotonic() >= until:
                return False, None
    except StopIteration as end:
        return True, end.value


@dataclass(frozen=True, slots=True)
class AdmissionReport:
    """The work budget, its used bytes and its waiting jobs, and the refusals by kind since the process started."""

    budget: int
    used: int
    waiting: int
    refused: Mapping[Refusal, int]


class Admission:
    """The one place that decides whether requests and work may begin in this process. Used from one event loop.

    `in_flight` and `in_flight_tenant` bound requests, `work_bytes` the memory of work in progress. Up to `processors`
    short calls (at least two) and half as many long computations (at least one) run in parallel; tenants take turns.
    """

    def __init__(
        self,
        *,
        in_flight: int,
        in_flight_tenant: int,
        work_bytes: int,
        processors: int,
        patience: float = PATIENCE,
    ) -> None:
        self.requests = InFlight(in_flight, in_flight_tenant)
        self.memory = WorkBudget(work_bytes)
        self._short = Turns(max(processors, 2))
        self._long = Turns(max(processors // 2, 1))
        self._patience = patience
        self._admitted: dict[Job, asyncio.Event] = {}  # of the waiting jobs
        self._refused: dict[Refusal, int] = dict.fromkeys(get_args(Refusal), 0)

    def begin(self, tenant: str | None, *, reserved: bool = False) -> None:
        """Counts a request in flight. End it with `requests.end`.

        `tenant` is None if the request is for no tenant's adapters; `reserved` requests may also take the last
        `RESERVE` places.

        Raises:
            Overloaded: there are too many in flight.
        """
        try:  # every request comes here, and `_counting` would cost two microseconds
            self.requests.begin(tenant, reserved=reserved)
        except Overloaded:
            self._refused["requests"] += 1
            raise

    def begin_stranger(self) -> None:
        """Counts a request without a key. End it with `requests.end_stranger`.

        Raises:
            Overloaded: there are too many in flight.
        """
        with self._counting("requests", Overloaded):
            self.requests.begin_stranger()

    @contextlib.asynccontextmanager
    async def work(self, tenant: str, nbytes: int) -> AsyncIterator[Work]:
        """Reserves memory for a tenant's work while the block runs; waits for it in the tenant's turn.

        Raises:
            OutOfSpace: one request may not take that much.
            Overloaded: other work held the memory for too long.
        """
        with self._counting("size", OutOfSpace):
            job = self.memory.ask(tenant, nbytes)
        try:
            if not job.is_admitted:
                with self._counting("memory", Overloaded):
                    await self._wait(job)
            yield Work(tenant, self._short, self._long)
        finally:
            for admitted in self.memory.end(job):
                self._admitted[admitted].set()

    async def _wait(self, job: Job) -> None:
        self._admitted[job] = admitted = asyncio.Event()
        try:
            with span("wait for memory", {"prefix.bytes": job.nbytes}):
                async with asyncio.timeout(self._patience):
                    await admitted.wait()
        except TimeoutError as error:
            if job.is_admitted:
                return
            raise Overloaded(
                f"this takes {job.nbytes} bytes of memory, which other work has held for {self._patience:g} seconds: "
                "try again",
                5,
            ) from error
        finally:
            del self._admitted[job]

    @contextlib.contextmanager
    def _counting(self, kind: Refusal, refusal: type[PrefixServiceError]) -> Iterator[None]:
        try:
            yield
        except refusal:
            self._refused[kind] += 1
            raise

    async def run(self, tenant: str, call: Callable[[], T]) -> T:
        """Runs `call` in a thread once it is the tenant's turn; for work that takes time, but little memory."""
        return await self._short.run(tenant, call)

    def report(self) -> AdmissionReport:
        """Returns the current state."""
        return AdmissionReport(self.memory.budget, self.memory.used, self.memory.waiting, dict(self._refused))
