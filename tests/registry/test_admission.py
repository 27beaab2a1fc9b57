"""`registry.admission` decides which work begins, and for which tenant, and loses none of it."""

import asyncio
import threading
from collections import Counter, deque
from collections.abc import Generator

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from prefix_service.errors import OutOfSpace, Overloaded
from prefix_service.registry import admission as module
from prefix_service.registry.admission import RESERVE, Admission, InFlight
from prefix_service.registry.work_budget import Job, WorkBudget

BUDGET = 256  # large jobs leave 32, and small ones have 4 at most
RESERVED, SMALL = 32, 4
tenants = st.sampled_from("abcd")


@pytest.fixture
def anyio_backend() -> str:
    """Returns asyncio, whose own tasks admission uses."""
    return "asyncio"


class Budgets(RuleBasedStateMachine):
    """A model of the budget: the jobs that run, the queue of each tenant, and whose turn it is."""

    def __init__(self) -> None:
        super().__init__()
        self.budget = WorkBudget(BUDGET)
        self.running: list[Job] = []
        self.waiting: dict[str, deque[Job]] = {}  # in the order of the tenants' turns
        self.ended: list[Job] = []

    @property
    def free(self) -> int:
        return BUDGET - sum(job.nbytes for job in self.running)

    def held(self, tenant: str) -> int:
        return sum(job.nbytes for job in self.running if job.tenant == tenant)

    def runs(self, tenant: str) -> bool:
        return any(job.tenant == tenant for job in self.running)

    def fits(self, job: Job) -> bool:
        """Returns whether the free bytes suffice for a job: for a tenant that runs nothing the job's own bytes, for
        another as many as it would hold afterwards. A large job leaves out the bytes that are reserved for small ones.
        """
        left = self.free - job.nbytes - (RESERVED if job.nbytes > SMALL else 0)
        return left >= (self.held(job.tenant) + job.nbytes if self.runs(job.tenant) else 0)

    def may_begin(self, job: Job) -> bool:
        starved = any(not self.runs(tenant) for tenant in self.waiting)
        return self.fits(job) and not (self.runs(job.tenant) and starved and self.held(job.tenant) + job.nbytes > SMALL)

    def check_admitted(self, admitted: list[Job]) -> None:
        """Checks that each admitted job was first in its queue and could begin, and no tenant before it could."""
        for job in admitted:
            assert job.is_admitted
            assert job is self.waiting[job.tenant][0]
            assert self.may_begin(job)
            runs = self.runs(job.tenant)
            for tenant, queue in self.waiting.items():
                if tenant == job.tenant:
                    break
                assert self.runs(tenant) is not runs or not self.may_begin(queue[0])
            queue = self.waiting.pop(job.tenant)
            queue.popleft()
            if queue:
                self.waiting[job.tenant] = queue
            self.running.append(job)

    @rule(tenant=tenants, nbytes=st.one_of(st.integers(0, SMALL), st.integers(0, BUDGET // 4), st.integers(0, BUDGET)))
    def ask(self, tenant: str, nbytes: int) -> None:
        may_begin = tenant not in self.waiting and self.may_begin(Job(tenant, nbytes))
        small = sum(job.nbytes for job in self.running if job.nbytes <= SMALL)
        if nbytes <= SMALL and small + nbytes <= RESERVED and tenant not in self.waiting and not self.runs(tenant):
            assert may_begin  # whatever large jobs the others have
        try:
            job = self.budget.ask(tenant, nbytes)
        except OutOfSpace:
            assert nbytes > BUDGET // 2
            return
        assert nbytes <= BUDGET // 2
        assert job.is_admitted is may_begin
        if may_begin:
            self.running.append(job)
        else:
            self.waiting.setdefault(tenant, deque()).append(job)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        job = data.draw(st.sampled_from(self.running))
        self.running.remove(job)
        self.ended.append(job)
        self.check_admitted(self.budget.end(job))

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        tenant = data.draw(st.sampled_from(list(self.waiting)))
        job = data.draw(st.sampled_from(list(self.waiting[tenant])))
        self.waiting[tenant].remove(job)
        if not self.waiting[tenant]:
            del self.waiting[tenant]
        self.ended.append(job)
        self.check_admitted(self.budget.end(job))

    @rule()
    def end_everything(self) -> None:
        """Ends all jobs, and checks that every waiting one was admitted once."""
        while self.running:
            self.end_first()
        assert not self.waiting
        assert (self.budget.used, self.budget.waiting) == (0, 0)
        assert not self.budget._tenants
        assert not self.budget._turns

    def end_first(self) -> None:
        job = self.running.pop(0)
        self.ended.append(job)
        self.check_admitted(self.budget.end(job))

    @invariant()
    def bytes_are_counted(self) -> None:
        assert 0 <= self.free <= BUDGET
        assert self.budget.used == BUDGET - self.free
        assert all(self.budget.held_by(tenant) == self.held(tenant) for tenant in "abcd")
        assert self.budget.waiting == sum(map(len, self.waiting.values()))

    @invariant()
    def what_may_begin_has_begun(self) -> None:
        for queue in self.waiting.values():
            assert not self.may_begin(queue[0])

    @invariant()
    def nothing_is_admitted_twice(self) -> None:
        jobs = [*self.running, *self.ended, *(job for queue in self.waiting.values() for job in queue)]
        assert max(Counter(map(id, jobs)).values(), default=1) == 1
        assert not any(job.is_admitted for queue in self.waiting.values() for job in queue)


TestWorkBudget = Budgets.TestCase


@pytest.mark.parametrize("greedy", [1, 2, 3, 5])
def test_greedy_tenants_leave_as_much_as_each_has(greedy: int) -> None:
    """n greedy tenants get 1/(n + 1) of the budget each and leave as much to the next tenant, who gets it immediately;
    a large job gets an eighth of the budget less.
    """
    budget = WorkBudget(60_000)
    for _ in range(60_000 // 10):
        for tenant in range(greedy):
            budget.ask(str(tenant), 10)
    share = 60_000 // (greedy + 1)
    for tenant in range(greedy):
        assert abs(budget.held_by(str(tenant)) - share) <= 10 * greedy
    assert budget.ask("next", share - 60_000 // 8 - 10 * greedy).is_admitted


def test_a_tenant_that_waits_is_not_passed_by_one_that_runs() -> None:
    """Small jobs of two tenants cannot keep a large job of a third waiting for ever."""
    budget = WorkBudget(100)
    small = {tenant: [budget.ask(tenant, 10) for _ in range(2)] for tenant in "ab"}
    large = budget.ask("c", 50)
    assert not large.is_admitted
    for _ in range(10):
        assert not budget.ask("a", 2).is_admitted
    assert budget.ask("d", 18).is_admitted  # it runs nothing either
    assert budget.end(small["a"][0]) == []
    assert budget.end(small["b"][0]) == [large]


def test_two_tenants_leave_room_for_the_small_jobs_of_others() -> None:
    """Two tenants that ask for all sizes leave each of many others a small job immediately, and a second."""
    budget = WorkBudget(64 * 1024)
    for nbytes in (32 * 1024, 16 * 1024, 8 * 1024, 4 * 1024, 1024):
        for tenant in ("greedy", "too") * 64:
            budget.ask(tenant, nbytes)
    assert budget.held_by("greedy") + budget.held_by("too") >= 32 * 1024
    for number in range(16):
        assert budget.ask(str(number), 64).is_admitted


class Requests(RuleBasedStateMachine):
    """A model of the requests in flight."""

    def __init__(self) -> None:
        super().__init__()
        self.counted = InFlight(6, 3)
        self.requests: list[str | None] = []

    @rule(tenant=st.one_of(st.none(), tenants), reserved=st.booleans())
    def begin(self, tenant: str | None, reserved: bool) -> None:
        total, own = len(self.requests), self.requests.count(tenant)
        try:
            self.counted.begin(tenant, reserved=reserved)
        except Overloaded:
            assert total >= (6 + RESERVE if reserved else 6) or (tenant is not None and own >= 3)
        else:
            assert total < (6 + RESERVE if reserved else 6)
            assert tenant is None or own < 3
            self.requests.append(tenant)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        tenant = data.draw(st.sampled_from(self.requests))
        self.requests.remove(tenant)
        self.counted.end(tenant)

    @invariant()
    def all_are_counted(self) -> None:
        assert self.counted.total == len(self.requests)
        assert all(self.counted.of(tenant) == self.requests.count(tenant) for tenant in "abcd")
        assert set(self.counted._of) == set(self.requests) - {None}


TestInFlight = Requests.TestCase


def admission(work_bytes: int = 100, patience: float = 30.0, processors: int = 2) -> Admission:
    return Admission(in_flight=10, in_flight_tenant=10, work_bytes=work_bytes, processors=processors, patience=patience)


async def hold(of: Admission, tenant: str, nbytes: int, until: asyncio.Event, begun: list[str]) -> None:
    async with of.work(tenant, nbytes):
        begun.append(tenant)
        await until.wait()


async def settled() -> None:
    """Lets every task run as far as it can."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_work_waits_for_memory() -> None:
    """Work begins when there is room, and gives its bytes back when it ends."""
    of, first, second, begun = admission(), asyncio.Event(), asyncio.Event(), list[str]()
    tasks = [asyncio.create_task(hold(of, tenant, 40, event, begun)) for tenant, event in (("a", first), ("b", second))]
    waiting = asyncio.create_task(hold(of, "c", 40, second, begun))
    await settled()
    assert begun == ["a", "b"]
    assert (of.report().used, of.report().waiting) == (80, 1)
    first.set()
    await settled()
    assert begun == ["a", "b", "c"]
    second.set()
    await asyncio.gather(*tasks, waiting)
    assert (of.report().used, of.report().waiting) == (0, 0)


async def test_tenants_wait_in_turn() -> None:
    """Five earlier jobs of one tenant delay each other, and not the job of another tenant."""
    of, begun = admission(), list[str]()
    holding, done = asyncio.Event(), asyncio.Event()
    done.set()
    tasks = [asyncio.create_task(hold(of, "holder", 40, holding, begun)) for _ in range(1)]
    tasks.append(asyncio.create_task(hold(of, "other", 40, holding, begun)))
    await settled()
    tasks += [asyncio.create_task(hold(of, "many", 40, done, begun)) for _ in range(5)]
    tasks.append(asyncio.create_task(hold(of, "one", 40, done, begun)))
    await settled()
    holding.set()
    await asyncio.gather(*tasks)
    assert begun[2:].index("one") <= 1
    assert begun[2:].count("many") == 5


async def test_who_gives_up_waiting_takes_nothing() -> None:
    """A caller that is cancelled while it waits, or in the moment of its admission, keeps no bytes."""
    of, held, begun = admission(), asyncio.Event(), list[str]()
    holders = [asyncio.create_task(hold(of, tenant, 40, held, begun)) for tenant in "ab"]
    await settled()
    waiting = asyncio.create_task(hold(of, "c", 40, held, begun))
    await settled()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert of.report().waiting == 0
    late = asyncio.create_task(hold(of, "d", 40, held, begun))
    await settled()
    holders[0].cancel()
    await asyncio.sleep(0)  # the memory is the late one's now, which has not noticed yet
    late.cancel()
    held.set()
    await asyncio.gather(*holders, late, return_exceptions=True)
    assert begun == ["a", "b"]
    assert (of.report().used, of.report().waiting) == (0, 0)


async def test_patience_ends() -> None:
    """Waiting too long raises Overloaded with a time to retry, an impossible size OutOfSpace; both are counted."""
    of, held, begun = admission(patience=0.01), asyncio.Event(), list[str]()
    holders = [asyncio.create_task(hold(of, tenant, 40, held, begun)) for tenant in "ab"]
    await settled()
    with pytest.raises(Overloaded, match=r"40 bytes of memory, which other work has held for 0\.01 seconds") as told:
        await hold(of, "c", 40, held, begun)
    assert told.value.retry_after == 5
    with pytest.raises(OutOfSpace, match="takes 51 bytes of memory, and one request may take 50"):
        await hold(of, "c", 51, held, begun)
    held.set()
    await asyncio.gather(*holders)
    assert of.report().refused == {"requests": 0, "size": 1, "memory": 1}
    assert (of.report().used, of.report().waiting) == (0, 0)


async def test_what_fails_gives_its_memory_back() -> None:
    """A failure in the block or its thread gives the bytes back; `run` returns the call's result."""
    of = admission()

    async def fail() -> None:
        async with of.work("a", 50) as work:
            assert await work.run(lambda: 7) == 7
            await work.run(lambda: 1 // 0)

    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            await fail()
    assert of.report().used == 0


async def test_a_long_computation_leaves_a_place_for_others() -> None:
    """On one processor another tenant's work is done while five long calls of one tenant run or wait."""
    of, go = admission(1000, processors=1), threading.Event()

    async def compute(tenant: str, call: threading.Event) -> bool:
        async with of.work(tenant, 10) as work:
            return await work.run(lambda: call.wait(60))

    long = [asyncio.create_task(compute("many", go)) for _ in range(5)]
    await settled()
    done = threading.Event()
    done.set()
    assert await asyncio.wait_for(compute("one", done), 60)
    assert not any(task.done() for task in long)
    go.set()
    assert await asyncio.gather(*long) == [True] * 5


async def test_long_computations_take_turns_and_delay_no_short_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tenants' steps alternate on one processor, and a short call runs between two steps."""
    monkeypatch.setattr(module, "_SLICE", 0)
    of, order, gate = admission(1000, processors=1), list[str](), threading.Semaphore(0)

    def steps(tenant: str) -> Generator[None, None, str]:
        for _ in range(3):
            order.append(tenant)
            assert gate.acquire(timeout=60)
            yield
        return tenant

    async def compute(tenant: str) -> str:
        async with of.work(tenant, 10) as work:
            return await work.compute(steps(tenant))

    tasks = [asyncio.create_task(compute(tenant)) for tenant in "ab"]
    await settled()
    async with of.work("c", 10) as work:
        assert await asyncio.wait_for(work.run(lambda: 7), 60) == 7
    assert await asyncio.wait_for(of.run("a", lambda: 8), 60) == 8
    gate.release(8)
    assert await asyncio.gather(*tasks) == ["a", "b"]
    assert order == ["a", "b"] * 3


async def test_a_cancelled_computation_ends_with_its_step() -> None:
    """Cancelling holds the memory until the step has ended and the generator is closed; no further step runs."""
    of, begun, go, closed = admission(), threading.Event(), threading.Event(), list[int]()

    def steps() -> Generator[None, None, None]:
        try:
            while True:
                begun.set()
                assert go.wait(60)
                yield
        finally:
            closed.append(of.report().used)

    async def compute() -> None:
        async with of.work("a", 50) as work:
            await work.compute(steps())

    task = asyncio.create_task(compute())
    assert await asyncio.to_thread(begun.wait, 60)
    task.cancel()
    await settled()
    assert not task.done()
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert closed == [50]
    assert of.report().used == 0


def test_refused_requests_are_counted() -> None:
    """Refusals are counted by kind alone, so that labels cannot grow."""
    of = Admission(in_flight=2, in_flight_tenant=1, work_bytes=100, processors=1)
    of.begin("a")
    with pytest.raises(Overloaded, match="tenant 'a' has 1 requests in flight"):
        of.begin("a")
    of.begin("b")
    with pytest.raises(Overloaded, match="2 requests are in flight"):
        of.begin("c")
    of.begin(None, reserved=True)
    assert of.report().refused == {"requests": 2, "size": 0, "memory": 0}
