"""`service.registry.residency`: pure state under a budget of bytes."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from service.errors import OutOfSpace, Unavailable
from service.registry.residency import Entry, Residency

BUDGET = 10
KEYS = st.sampled_from("abcdefg")


class Rules(RuleBasedStateMachine):
    """Against a model: a list of what is resident, least recently used first."""

    def __init__(self) -> None:
        super().__init__()
        self.residency: Residency[str] = Residency(BUDGET)
        self.sizes: dict[str, int] = {}  # in the order of use
        self.leases: list[tuple[str, Entry]] = []
        self.pinned: set[str] = set()

    @property
    def held(self) -> set[str]:
        """What may not leave."""
        return self.pinned | {key for key, entry in self.leases if self.residency.holds(key, entry)}

    @rule(key=KEYS, nbytes=st.integers(0, BUDGET + 2))
    def admit(self, key: str, nbytes: int) -> None:
        if key in self.sizes:
            return
        before, held = dict(self.sizes), self.held
        could_leave = sum(size for other, size in before.items() if other not in held)
        try:
            victims = self.residency.admit(key, nbytes)
        except OutOfSpace:
            assert nbytes > BUDGET
        except Unavailable:
            assert sum(before.values()) - could_leave + nbytes > BUDGET
        else:
            assert not held & set(victims)
            assert victims == [other for other in before if other not in held][: len(victims)]
            kept = BUDGET - sum(before.values())
            assert not victims or kept + sum(before[victim] for victim in victims[:-1]) < nbytes
            self.sizes = {other: size for other, size in before.items() if other not in victims} | {key: nbytes}

    @precondition(lambda self: self.sizes)
    @rule(data=st.data())
    def touch(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(list(self.sizes)))
        self.residency.touch(key)
        self.sizes[key] = self.sizes.pop(key)

    @precondition(lambda self: self.sizes)
    @rule(data=st.data())
    def lease(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(list(self.sizes)))
        self.leases.append((key, self.residency.lease(key)))

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        _, entry = self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1)))
        self.residency.release(entry)

    @precondition(lambda self: self.sizes)
    @rule(data=st.data(), pinned=st.booleans())
    def pin(self, data: st.DataObject, pinned: bool) -> None:
        key = data.draw(st.sampled_from(list(self.sizes)))
        self.residency.pin(key, pinned=pinned)
        (self.pinned.add if pinned else self.pinned.discard)(key)

    @rule(key=KEYS)
    def remove(self, key: str) -> None:
        self.residency.remove(key)
        self.sizes.pop(key, None)
        self.pinned.discard(key)

    @invariant()
    def the_budget_is_never_exceeded(self) -> None:
        assert 0 <= self.residency.used == sum(self.sizes.values()) <= BUDGET

    @invariant()
    def nothing_is_lost_and_nothing_held_has_left(self) -> None:
        assert {key for key in "abcdefg" if key in self.residency} == set(self.sizes) >= self.pinned
        assert len(self.residency) == len(self.sizes)
        assert {key for key in self.sizes if self.residency.is_pinned(key)} == self.pinned


# Any sequence of calls: the budget holds, what is leased or pinned stays, the least recently used leaves.
TestRules = Rules.TestCase
TestRules.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)


def full() -> Residency[str]:
    residency: Residency[str] = Residency(BUDGET)
    for key in "ab":
        assert residency.admit(key, 5) == []
    return residency


def test_the_least_recently_used_leaves_first() -> None:
    """A use counts, and no more leave than must."""
    residency = full()
    residency.touch("a")
    assert residency.admit("c", 1) == ["b"]
    assert "a" in residency


@pytest.mark.parametrize("how", ["lease", "pin"])
def test_what_is_held_stays(how: str) -> None:
    """The next one leaves instead."""
    residency = full()
    if how == "lease":
        residency.lease("a")
    else:
        residency.pin("a", pinned=True)
    assert residency.admit("c", 1) == ["b"]


def test_too_large_for_the_budget() -> None:
    """No waiting would help, so it is OutOfSpace, and nothing leaves."""
    residency = full()
    with pytest.raises(OutOfSpace, match="11 bytes do not fit the memory budget of 10 bytes"):
        residency.admit("c", 11)
    assert len(residency) == 2


def test_everything_is_in_use() -> None:
    """Waiting helps, so it is Unavailable with a time, and nothing leaves, not even what could."""
    residency = full()
    residency.lease("a")
    with pytest.raises(Unavailable, match="6 bytes are needed, and all but 5 of 10 are in use") as caught:
        residency.admit("c", 6)
    assert caught.value.retry_after == 1
    assert "b" in residency


def test_a_lease_of_what_was_removed_holds_nothing() -> None:
    """The same key admitted again is another entry, and the old lease's end does not touch it."""
    residency = full()
    old = residency.lease("a")
    residency.remove("a")
    residency.admit("a", 5)
    new = residency.lease("a")
    assert not residency.holds("a", old)
    residency.release(old)
    assert (new.leases, residency.holds("a", new)) == (1, True)
