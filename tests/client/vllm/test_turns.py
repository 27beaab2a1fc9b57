"""vLLM's requests share questions, fetches and host memory, with tenants in turn and within budgets. Needs no vLLM."""

from collections import Counter
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from prefix_service.client.vllm.shelf import _FETCHES, Load, Parcel, Reports, Shelf
from prefix_service.client.vllm.tally import CACHE, HOST, MOST_NAMED, Tally, added
from prefix_service.client.vllm.turns import Share, Turns
from prefix_service.errors import NotFound, OutOfSpace


@pytest.mark.parametrize(("tenants", "each"), [(1, 6), (2, 4), (3, 3)])
def test_tenants_that_take_all_they_may_have_equal_parts_and_leave_one_as_large(tenants: int, each: int) -> None:
    """One tenant gets half of the whole, two get a third each, three a quarter each."""
    share, names = Share(12), [f"tenant-{number}" for number in range(tenants)]
    taken = Counter[str]()
    while begun := [name for name in names if share.has_room(name, 1)]:
        for name in begun:
            if share.has_room(name, 1):
                share.take(name, 1)
                taken[name] += 1
    assert taken == dict.fromkeys(names, each)
    assert share.has_room("another", 12 - share.taken)
    share.give(names[0], 1)
    assert share.has_room(names[0], 1)


def test_who_has_nothing_may_take_all_that_is_left() -> None:
    """So a prefix that is larger than one tenant's part is served too, once there is room."""
    share = Share(10)
    assert share.has_room("a", 10)
    assert not share.has_room("a", 11)
    share.take("a", 10)
    assert not share.has_room("b", 1)


def test_what_waits_begins_tenant_by_tenant() -> None:
    """A tenant waits for one item of each other tenant, and an item that cannot begin delays no other."""
    turns = Turns[str]()
    for item in ("a1", "a2", "a3", "b1", "c1", "b2"):
        turns.add(item[0], item)
    turns.discard("a", "a2")
    turns.discard("d", "d1")
    taking = turns.take(lambda item: item != "b2")
    assert list(taking) == ["a1", "b1", "c1", "a3"]
    assert list(turns.take(lambda _: True)) == ["b2"]
    assert list(turns.take(lambda _: True)) == []


def _orders(shelf: Shelf) -> list[str]:
    return [reference for _, (reference,), _ in shelf.take_orders([]).fetches]


def test_a_parcel_is_here_when_every_worker_has_it_and_stays_while_there_is_room() -> None:
    """Requests share one fetch; the least recently used parcel makes room; a parcel above the budget is refused."""
    shelf = Shelf(10, 2, Tally())
    first, same = shelf.want("r1", "acme", ("a",), 5), shelf.want("r2", "acme", ("a",), 5)
    assert first is same
    assert _orders(shelf) == ["a"]
    shelf.take_reports(Reports({first.number: 1}).aggregate(Reports({first.number: 0})))
    assert not first.is_here
    shelf.take_reports(Reports({first.number: 1}))
    assert first.is_here
    for request in ("r1", "r2", "r2"):
        shelf.leave(request, first)
    assert shelf.want("r3", "acme", ("a",), 5) is first  # without an order
    shelf.leave("r3", first)
    other = shelf.want("r4", "acme", ("b",), 6)
    orders = shelf.take_orders([Load("r", first.number)])
    assert (orders.drops, orders.fetches) == ([first.number], [(other.number, ("b",), None)])
    with pytest.raises(OutOfSpace, match="large has 11 bytes on each worker, more than all of cache_bytes, 10"):
        shelf.want("r5", "acme", ("large",), 11)


def test_a_parcel_that_nobody_waits_for_is_given_up() -> None:
    """A waiting fetch is forgotten, a running one is dropped by an order; later reports of it are ignored."""
    shelf = Shelf(10, 1, Tally())
    parcel, waiting = shelf.want("r1", "acme", ("a",), 10), shelf.want("r2", "acme", ("b",), 10)
    assert _orders(shelf) == ["a"]
    shelf.leave("r2", waiting)
    shelf.leave("r1", parcel)
    assert shelf.take_orders([]).drops == [parcel.number]
    shelf.take_reports(Reports({parcel.number: 1}, {waiting.number: NotFound("late")}))
    again = shelf.want("r3", "acme", ("a",), 10)
    assert (again.number, _orders(shelf)) == (3, ["a"])


def test_a_failure_reaches_those_who_wait_and_nobody_later() -> None:
    """The next request fetches again, and the room on every worker is free."""
    shelf = Shelf(10, 2, Tally())
    parcel = shelf.want("r1", "acme", ("a",), 10)
    assert _orders(shelf) == ["a"]
    shelf.take_reports(Reports({parcel.number: 1}, {parcel.number: NotFound("gone")}))
    assert parcel.error is not None
    again = shelf.want("r2", "acme", ("a",), 10)
    orders = shelf.take_orders([])
    assert (orders.drops, orders.fetches) == ([parcel.number], [(again.number, ("a",), None)])
    shelf.leave("r1", parcel)
    assert shelf.take_orders([]).drops == []


def test_what_is_forgotten_is_fetched_again() -> None:
    """A parcel in use stays until its requests leave, and counts as loaded until then."""
    tally = Tally()
    shelf = Shelf(10, 1, tally)
    kept, used = shelf.want("r1", "acme", ("a",), 2), shelf.want("r2", "acme", ("b",), 2)
    shelf.take_orders([])
    shelf.take_reports(Reports({kept.number: 1, used.number: 1}))
    shelf.leave("r1", kept)
    shelf.forget()
    assert shelf.take_orders([]).drops == [kept.number]
    assert shelf.want("r3", "acme", ("b",), 2) is not used
    shelf.leave("r2", used)
    assert shelf.take_orders([]).drops == [used.number]
    counted = tally.take()
    assert counted is not None
    assert counted["loaded"] == []


def test_what_is_loaded_is_reported_when_it_changes_and_up_to_a_limit() -> None:
    """Reports have names without versions, each level once, and loads, waits and failures since the last reading."""
    tally = Tally()
    assert tally.take() is None
    for reference in ("acme/a@sha256:1", "acme/a@sha256:2"):
        tally.load((reference,), HOST)
    tally.load(("acme/a@sha256:1", "acme/b@sha256:3"), CACHE)
    tally.add_load(0.5, 100)
    nothing: dict[str, Any] = {"load_seconds": [], "load_bytes": 0, "wait_seconds": [], "failures": 0}
    first = tally.take()
    loaded = [["acme/a", "cpu"], ["acme/a,acme/b", "gpu"]]
    assert first == {**nothing, "load_seconds": [0.5], "load_bytes": 100, "loaded": loaded, "left": []}
    tally.unload(("acme/a@sha256:2",), HOST)
    assert tally.take() is None
    tally.add_wait(0.1)
    tally.add_failure()
    second = tally.take()
    assert second == {**nothing, "wait_seconds": [0.1], "failures": 1}
    tally.unload(("acme/a@sha256:1",), HOST)
    third = tally.take()
    assert third == {**nothing, "loaded": loaded[1:], "left": loaded[:1]}
    both = {"load_seconds": [0.5], "load_bytes": 100, "wait_seconds": [0.1], "failures": 1}
    assert added(first, second) == {**both, "loaded": loaded, "left": []}
    assert added(added(first, second), third) == {**both, "loaded": loaded[1:], "left": loaded[:1]}
    assert added(third, first)["left"] == []  # it is back
    assert added(second, second) == {**nothing, "wait_seconds": [0.1, 0.1], "failures": 2}
    for number in range(MOST_NAMED + 1):
        tally.load((f"acme/{number}",), HOST)
    last = tally.take()
    assert last is not None
    assert last["loaded"] == [[f"acme/{number}", "cpu"] for number in range(1, MOST_NAMED + 1)]


class ShelfMachine(RuleBasedStateMachine):
    """Workers that carry out the orders never exceed the budget, and hold all parcels that the shelf counts as held."""

    BUDGET, WORKERS = 20, 2

    def __init__(self) -> None:
        super().__init__()
        self.tally = Tally()
        self.shelf = Shelf(self.BUDGET, self.WORKERS, self.tally)
        self.users: dict[str, Parcel] = {}
        self.held: dict[int, Parcel] = {}  # what the workers have, or fetch
        self.silent: dict[int, int] = {}  # of each fetch, the workers that have not reported it
        self.requests = 0

    @rule(tenant=st.sampled_from("abc"), name=st.sampled_from("xyzw"), size=st.integers(1, 12))
    def want(self, tenant: str, name: str, size: int) -> None:
        self.requests += 1
        references = (f"{tenant}/{name}/{size}",)
        self.users[f"r{self.requests}"] = self.shelf.want(f"r{self.requests}", tenant, references, size)

    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        if self.users:
            request = data.draw(st.sampled_from(sorted(self.users)))
            self.shelf.leave(request, self.users.pop(request))

    @rule()
    def step(self) -> None:
        parcels = {parcel.number: parcel for parcel in self.users.values()}
        orders = self.shelf.take_orders([])
        for number in orders.drops:
            del self.held[number]
            self.silent.pop(number, None)
        for number, references, _ in orders.fetches:
            assert parcels[number].references == references  # somebody waits for it
            self.held[number], self.silent[number] = parcels[number], self.WORKERS

    @rule(data=st.data(), fails=st.booleans())
    def report(self, data: st.DataObject, fails: bool) -> None:
        if self.silent:
            number = data.draw(st.sampled_from(sorted(self.silent)))
            self.silent[number] -= 1
            if not self.silent[number] or fails:
                del self.silent[number]
            self.shelf.take_reports(Reports({}, {number: NotFound("x")}) if fails else Reports({number: 1}))

    @rule()
    def forget(self) -> None:
        self.shelf.forget()

    @invariant()
    def keeps_the_budget(self) -> None:
        assert sum(parcel.nbytes for parcel in self.held.values()) <= self.BUDGET or self.shelf._drops
        assert len(self.silent) <= _FETCHES

    @invariant()
    def holds_what_is_here(self) -> None:
        for parcel in self.users.values():
            if parcel.is_here:
                assert parcel.number in self.held
                assert parcel.number not in self.silent

    @invariant()
    def reports_what_is_here(self) -> None:
        here = Counter(parcel.references[0] for parcel in self.shelf._by_number.values() if parcel.is_here)
        assert {name: count for (name, _), count in self.tally._loaded.items()} == here

    def teardown(self) -> None:
        """Every waiting request is served in the end, and no tenant is charged once all have left."""
        for _ in range(3 * len(self.users) + 1):
            self.step()
            for number, count in list(self.silent.items()):
                self.shelf.take_reports(Reports({number: count}))
                del self.silent[number]
            for request, parcel in list(self.users.items()):
                if parcel.is_here or parcel.error:
                    self.shelf.leave(request, self.users.pop(request))
        assert not self.users
        assert (self.shelf._slots.taken, self.shelf._bytes.taken) == (0, 0)


TestShelf: Any = ShelfMachine.TestCase
