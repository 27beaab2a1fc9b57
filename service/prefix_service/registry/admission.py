"""What may begin now: requests in flight, and the memory and processor time of work in progress.

Everything that allocates, or computes for long, by what a caller sent asks here first, in the name of the tenant that
pays for it. Refusals come before the work and cost nothing.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Final, Literal, TypeVar, cast, get_args

from prefix_service.errors import OutOfSpace, Overloaded, PrefixServiceError
from prefix_service.registry.turns import Turns, in_thread
from prefix_service.registry.work_budget import Job, WorkBudget

T = TypeVar("T")

Refusal = Literal["requests", "size", "memory"]
"""Too many requests in flight; work that takes more than one request may; work that waited too long for memory."""

PLATFORM: Final = "(the platform)"
"""Pays for what the platform's own keys ask for beside tenants' adapters; no tenant's name has a space."""

PATIENCE: Final = 30.0
"""Seconds that work waits for memory before its request is refused."""

RESERVE: Final = 16
"""Requests that the platform's operators may have in flight when the process takes no others."""

_SLICE: Final = 0.25  # seconds after which a long computation gives its turn back
_STRANGERS: Final = 16
"""Requests of callers without a key have places of their own: one for so many that the process takes of others."""


class InFlight:
    """Counts requests, in all and of each tenant. Pure state."""

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
        """Returns the requests in flight of one tenant."""
        return self._of.get(tenant, 0)

    def begin(self, tenant: str | None, *, reserved: bool = False) -> None:
        """Counts a request. `tenant` is None where nobody's adapters are asked for; `reserved` requests may also take
        the last `RESERVE` places of the process.

        Raises:
            Overloaded: there are too many; the request is not counted.
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
        """Counts a request of a caller without a key, apart from all others; end it with `end_stranger`.

        Raises:
            Overloaded: there are too many; the request is not counted.
        """
        if self.strangers >= self._most_strangers:
            raise Overloaded(
                f"{self.strangers} requests without a key are in flight, the most that this process takes: try again"
            )
        self.strangers += 1

    def end_stranger(self) -> None:
        """Ends what `begin_stranger` counted."""
        self.strangers -= 1

    def end(self, tenant: str | None) -> None:
        """Ends what `begin` counted."""
        self.total -= 1
        if tenant is not None:
            left = self._of.pop(tenant) - 1
            if left:
                self._of[tenant] = left


class Work:
    """Admitted work of a tenant: `run` is for short calls, `compute` for long computations. They have separate turns,
    so a short call never waits for a long computation."""

    def __init__(self, tenant: str, short: Turns, long: Turns) -> None:
        self._tenant, self._short, self._long = tenant, short, long

    async def run(self, call: Callable[[], T]) -> T:
        """Calls in a thread, once it is the tenant's turn."""
        return await self._short.run(self._tenant, call)

    async def compute(self, steps: Generator[None, None, T]) -> T:
        """Returns what a generator returns; its steps run in threads, in the tenant's turns. A turn ends with the first
        step that ends later than `_SLICE` seconds after its beginning. A caller that is cancelled waits for the step
        that runs, if any; then the generator is closed."""
        try:
            while True:
                ended, value = await self._long.run(self._tenant, partial(_some_steps, steps))
                if ended:
                    return cast(T, value)
        except BaseException:
            await in_thread(steps.close)
            raise


def _some_steps(steps: Generator[None, None, T]) -> tuple[bool, T | None]:
    """Takes steps until a slice of time is over. Returns whether the generator has ended, and what it returned."""
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
    """Bytes of the work budget, those that are held, jobs that wait; and refusals by kind since the start."""

    budget: int
    used: int
    waiting: int
    refused: Mapping[Refusal, int]


class Admission:
    """The one place that decides whether requests and work may begin in this process. Used from one event loop.

    `in_flight` and `in_flight_tenant` bound requests, `work_bytes` the memory of work in progress. `processors` short
    calls run in parallel, at least two, and half as many long computations, at least one; tenants in turn.
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
        self._admitted: dict[Job, asyncio.Event] = {}  # of the jobs that wait
        self._refused: dict[Refusal, int] = dict.fromkeys(get_args(Refusal), 0)

    def begin(self, tenant: str | None, *, reserved: bool = False) -> None:
        """Counts a request in flight, as `InFlight.begin`; end it with `requests.end`.

        Raises:
            Overloaded: there are too many in flight.
        """
        with self._counting("requests", Overloaded):
            self.requests.begin(tenant, reserved=reserved)

    def begin_stranger(self) -> None:
        """Counts a request without a key, as `InFlight.begin_stranger`; end it with `requests.end_stranger`.

        Raises:
            Overloaded: there are too many in flight.
        """
        with self._counting("requests", Overloaded):
            self.requests.begin_stranger()

    @contextlib.asynccontextmanager
    async def work(self, tenant: str, nbytes: int) -> AsyncIterator[Work]:
        """Reserves memory for a tenant's work while the block runs; waits for it in the tenant's turn.

        Raises:
            OutOfSpace: one request may not take as much.
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
        """Calls in a thread, once it is the tenant's turn; for work that takes time and no memory to speak of."""
        return await self._short.run(tenant, call)

    def report(self) -> AdmissionReport:
        """Returns the state of this moment."""
        return AdmissionReport(self.memory.budget, self.memory.used, self.memory.waiting, dict(self._refused))
