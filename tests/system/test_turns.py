"""`system.turns`: a few threads, tenants in turn."""

import asyncio
import threading
from collections.abc import Callable
from functools import partial

import pytest
from anyio import to_thread

from prefix_service.system.turns import Turns


@pytest.fixture
def anyio_backend() -> str:
    """The registry uses asyncio's own tasks."""
    return "asyncio"


class Gate:
    """Calls that note their name when they run, and wait to be let go in the order in which they began."""

    def __init__(self) -> None:
        self.order: list[str] = []
        self.running = 0
        self.most = 0
        self.started = threading.Semaphore(0)
        self._opened = 0
        self._changed = threading.Condition()

    def call(self, name: str) -> Callable[[], str]:
        def run() -> str:
            with self._changed:
                place = len(self.order)
                self.order.append(name)
                self.running += 1
                self.most = max(self.most, self.running)
                self.started.release()
                assert self._changed.wait_for(lambda: self._opened > place, timeout=60)
                self.running -= 1
            return name

        return run

    def open(self, times: int) -> None:
        with self._changed:
            self._opened += times
            self._changed.notify_all()


async def begun(turns: Turns, gate: Gate, tenant: str, names: list[str]) -> list[asyncio.Task[str]]:
    """Tasks that have asked for their turn, in this order."""
    tasks = [asyncio.create_task(turns.run(tenant, gate.call(name))) for name in names]
    await asyncio.sleep(0)
    return tasks


async def two_have_started(gate: Gate) -> None:
    """Two more, each of which holds its place until the gate is opened for it."""
    for _ in range(2):
        assert await asyncio.to_thread(gate.started.acquire, timeout=60)


async def test_one_load_does_not_wait_behind_another_tenants_five_hundred() -> None:
    """Of the first two places that become free one is its own."""
    turns, gate = Turns(2), Gate()
    many = await begun(turns, gate, "many", [f"many{number}" for number in range(500)])
    others = await begun(turns, gate, "other", ["other"]) + await begun(turns, gate, "one", ["one"])
    await two_have_started(gate)
    gate.open(2)
    await two_have_started(gate)
    # Two ran already, then one of the queue of each tenant; their threads note themselves in either order.
    assert set(gate.order[2:4]) == {"many1", "one"}
    gate.open(500)
    await asyncio.gather(*many, *others)
    assert len(gate.order) == 502
    assert gate.most <= 2


async def test_one_tenant_never_takes_the_last_place() -> None:
    """Another one's call begins while a hundred wait, and the place that it leaves stays free for a third."""
    turns, gate = Turns(3), Gate()
    many = await begun(turns, gate, "many", [f"many{number}" for number in range(100)])
    await two_have_started(gate)
    for name in ("second", "third"):
        quick = asyncio.create_task(turns.run(name, partial(str, name)))
        assert await asyncio.wait_for(quick, 60) == name
    assert set(gate.order) == {"many0", "many1"}
    gate.open(100)
    await asyncio.gather(*many)
    assert gate.most == 2


async def test_tenants_take_turns() -> None:
    """And each one's calls keep their order."""
    turns, gate = Turns(1), Gate()
    tasks = await begun(turns, gate, "a", ["a0", "a1", "a2"])
    tasks += await begun(turns, gate, "b", ["b0", "b1"])
    tasks += await begun(turns, gate, "c", ["c0"])
    gate.open(6)
    await asyncio.gather(*tasks)
    assert gate.order == ["a0", "a1", "b0", "c0", "a2", "b1"]


async def test_others_threads_stay_free() -> None:
    """While every place that a tenant may take is taken and many wait, what SQL and files run in is not touched."""
    turns, gate = Turns(4), Gate()
    tasks = await begun(turns, gate, "many", [str(number) for number in range(100)])
    for _ in range(3):
        assert await asyncio.to_thread(gate.started.acquire, timeout=60)
    assert gate.running == 3
    assert await asyncio.wait_for(to_thread.run_sync(partial(str, "sql")), 60) == "sql"
    assert to_thread.current_default_thread_limiter().borrowed_tokens == 0
    gate.open(100)
    await asyncio.gather(*tasks)


async def test_who_gives_up_waiting_leaves_its_turn_to_the_next() -> None:
    """It never runs."""
    turns, gate = Turns(1), Gate()
    first, waiting, last = await begun(turns, gate, "a", ["first", "waiting", "last"])
    waiting.cancel()
    gate.open(2)
    assert [await first, await asyncio.wait_for(last, 60)] == ["first", "last"]
    assert gate.order == ["first", "last"]
    with pytest.raises(asyncio.CancelledError):
        await waiting


async def test_who_gives_up_at_the_moment_of_its_turn_gives_it_back() -> None:
    """The place had been given to it, and it had not noticed yet."""
    turns = Turns(1)
    await turns._begin("a")
    task = asyncio.create_task(turns.run("a", lambda: 1))
    await asyncio.sleep(0)
    turns._end("a")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.wait_for(turns.run("a", lambda: 2), 60) == 2


async def test_a_call_that_fails_gives_its_place_back() -> None:
    """And its error reaches the caller."""
    turns = Turns(1)
    with pytest.raises(ZeroDivisionError):
        await turns.run("a", lambda: 1 // 0)
    assert await turns.run("a", lambda: 1) == 1


async def test_a_cancelled_call_keeps_its_place_until_it_has_ended() -> None:
    """A thread cannot be stopped, so the next call waits for it."""
    turns, gate = Turns(1), Gate()
    first, following = await begun(turns, gate, "a", ["first", "following"])
    assert await asyncio.to_thread(gate.started.acquire, timeout=60)
    first.cancel()
    for _ in range(10):
        await asyncio.sleep(0)
    assert not first.done()
    assert gate.order == ["first"]
    gate.open(2)
    assert await asyncio.wait_for(following, 60) == "following"
    with pytest.raises(asyncio.CancelledError):
        await first
    assert gate.most == 1
