"""`service.registry.residency`: pure state under a budget of bytes that tenants share."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from service.errors import OutOfSpace, Unavailable
from service.registry.residency import Residency
from service.registry.tenants import Entry

BUDGET = 24
KEYS = [tenant + name for tenant in "abc" for name in "123456"]
keys = st.sampled_from(KEYS)


class Rules(RuleBasedStateMachine):
    """Against a model: the sizes of what is resident. A key's first letter is its tenant."""

    def __init__(self) -> None:
        super().__init__()
        self.residency: Residency[str] = Residency(BUDGET)
        self.sizes: dict[str, int] = {}
        self.leases: list[tuple[str, Entry[str]]] = []
        self.pinned: set[str] = set()
        self.admitted = 0
        self.seen: dict[str, int] = {}

    @property
    def held(self) -> set[str]:
        """What may not leave."""
        return self.pinned | {key for key, entry in self.leases if self.residency.holds(key, entry)}

    def used(self, tenant: str, without: list[str] | None = None) -> int:
        return sum(size for key, size in self.sizes.items() if key[0] == tenant and key not in (without or []))

    def spared(self, tenant: str, requester: str, gone: list[str], share: int) -> bool:
        """Within the share, and awake."""
        awake = self.admitted - self.seen[tenant] <= BUDGET
        return tenant != requester and self.used(tenant, gone) <= share and awake

    def check_victims(self, tenant: str, victims: list[str], share: int) -> None:
        """Each in its turn: nothing held; nobody who is within the share loses to somebody above it, nor while
        anything else can leave."""
        assert not self.held & set(victims)
        assert set(victims) <= set(self.sizes)
        for number, victim in enumerate(victims):
            gone = victims[:number]
            if not self.spared(victim[0], tenant, gone, share):
                continue
            assert self.used(tenant, gone) <= share
            left = set(self.sizes) - set(gone) - self.held
            assert all(self.spared(key[0], tenant, gone, share) for key in left)

    def share(self, tenant: str) -> int:
        return BUDGET // (2 * len({key[0] for key in self.sizes} | {tenant}))

    @rule(key=keys, nbytes=st.one_of(st.integers(1, 5), st.integers(0, BUDGET + 2)))
    def admit(self, key: str, nbytes: int) -> None:
        if key in self.sizes:
            return
        share, free = self.share(key[0]), BUDGET - sum(self.sizes.values())
        try:
            victims = self.residency.admit(key, nbytes, key[0])
        except OutOfSpace:
            assert nbytes > BUDGET
        except Unavailable:
            self.check_refusal(key[0], nbytes, free, share)
        else:
            self.check_victims(key[0], victims, share)
            assert not victims or free + sum(self.sizes[victim] for victim in victims[:-1]) < nbytes
            self.sizes = {other: size for other, size in self.sizes.items() if other not in victims} | {key: nbytes}
            self.admitted += nbytes
            self.seen[key[0]] = self.admitted

    def check_refusal(self, tenant: str, nbytes: int, free: int, share: int) -> None:
        """Not even all of its own would be enough, nor all of everybody's while it is within its share."""
        loose = {key: size for key, size in self.sizes.items() if key not in self.held}
        own = sum(size for key, size in loose.items() if key[0] == tenant)
        assert free + own < nbytes
        if self.used(tenant) <= share:
            assert free + sum(loose.values()) < nbytes

    @rule(tenant=st.sampled_from("abc"))
    def spare(self, tenant: str) -> None:
        share = self.share(tenant)
        victims = self.residency.spare(tenant)
        self.check_victims(tenant, victims, share)
        for victim in victims:
            del self.sizes[victim]
        assert all(key in self.held for key in self.sizes if key[0] == tenant)

    @precondition(lambda self: self.sizes)
    @rule(data=st.data())
    def touch(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.sizes)))
        self.residency.touch(key)
        self.seen[key[0]] = self.admitted

    @precondition(lambda self: self.sizes)
    @rule(data=st.data())
    def lease(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.sizes)))
        self.leases.append((key, self.residency.lease(key)))

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        _, entry = self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1)))
        self.residency.release(entry)

    @precondition(lambda self: self.sizes)
    @rule(data=st.data(), pinned=st.booleans())
    def pin(self, data: st.DataObject, pinned: bool) -> None:
        key = data.draw(st.sampled_from(sorted(self.sizes)))
        self.residency.pin(key, pinned=pinned)
        (self.pinned.add if pinned else self.pinned.discard)(key)

    @rule(key=keys)
    def remove(self, key: str) -> None:
        self.residency.remove(key)
        self.sizes.pop(key, None)
        self.pinned.discard(key)

    @invariant()
    def the_budget_is_never_exceeded(self) -> None:
        assert 0 <= self.residency.used == sum(self.sizes.values()) <= BUDGET

    @invariant()
    def nothing_is_lost_and_nothing_held_has_left(self) -> None:
        assert {key for key in KEYS if key in self.residency} == set(self.sizes) >= self.pinned
        assert len(self.residency) == len(self.sizes)
        assert {key for key in self.sizes if self.residency.is_pinned(key)} == self.pinned

    @invariant()
    def the_bytes_of_all_tenants_add_up(self) -> None:
        tenants = {tenant.name: tenant for tenant in self.residency.tenants()}
        assert set(tenants) == {key[0] for key in self.sizes}
        for name, tenant in tenants.items():
            assert tenant.used == self.used(name)
        assert self.residency.pinned == sum(self.sizes[key] for key in self.pinned)
        assert self.residency.held == sum(self.sizes[key] for key in self.held)


# Any sequence of calls: the budget holds, what is leased or pinned stays, no tenant takes what is another's share.
TestRules = Rules.TestCase
TestRules.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)


def full(budget: int = 10) -> Residency[str]:
    residency: Residency[str] = Residency(budget)
    for key in "ab":
        assert residency.admit(key, 5, "acme") == []
    return residency


def filled(budget: int, tenant: str, count: int) -> Residency[str]:
    """`count` entries of one byte, `<tenant>0` …"""
    residency: Residency[str] = Residency(budget)
    for number in range(count):
        residency.admit(f"{tenant}{number}", 1, tenant)
    return residency


def kept(residency: Residency[str], tenant: str) -> int:
    return sum(key.startswith(tenant) for key, _ in residency.items())


def test_the_first_to_come_leaves_first() -> None:
    """While nothing was used twice, and no more leave than must."""
    assert full().admit("c", 1, "acme") == ["a"]


def test_what_was_used_twice_on_probation_stays() -> None:
    """It moves to the main queue when its turn comes; one use might be a burst."""
    residency = full()
    residency.touch("a")
    residency.touch("a")
    assert residency.admit("c", 1, "acme") == ["b"]


def test_a_scan_passes_through_a_tenth() -> None:
    """A hundred keys once each, and what was proven before is still there."""
    residency = filled(20, "hot", 18)
    for key, _ in list(residency.items()):
        residency.touch(key)
        residency.touch(key)
    for number in range(100):
        residency.admit(f"cold{number}", 1, "acme")
    assert (kept(residency, "hot"), kept(residency, "cold")) == (18, 2)


def test_what_comes_back_soon_is_proven() -> None:
    """It left, it is asked for again before as many others left: that is a use, too."""
    residency = filled(10, "k", 10)
    for number in range(10, 13):
        residency.admit(f"k{number}", 1, "k")
    assert "k1" not in residency
    residency.remove("k12")
    residency.admit("k1", 1, "k")
    assert residency.entry("k1").proven
    residency.remove("k11")
    residency.admit("never seen", 1, "k")
    assert not residency.entry("never seen").proven


@pytest.mark.parametrize("how", ["lease", "pin"])
def test_what_is_held_stays(how: str) -> None:
    """The next one leaves instead."""
    residency = full()
    if how == "lease":
        residency.lease("a")
    else:
        residency.pin("a", pinned=True)
    assert residency.admit("c", 1, "acme") == ["b"]


def test_a_tenants_scan_takes_a_tenth_of_its_share() -> None:
    """However much of the budget the other fills: the scan pays for itself."""
    residency = filled(1000, "hot", 1000)
    for number in range(5000):
        residency.admit(f"cold{number}", 1, "scanner")
    assert 50 <= kept(residency, "cold") <= 51  # a tenth of 500
    assert kept(residency, "hot") >= 949


def test_what_is_used_takes_the_place_of_what_is_not() -> None:
    """Beyond what is guaranteed, memory goes to who uses it: a tenant that comes second, and comes back for what it
    reads, gets all that it needs from one that does not."""
    residency = filled(100, "first", 100)
    for number in [*range(48)] * 3 + [*range(48, 60)] * 20:
        if (key := f"second{number}") in residency:
            residency.touch(key)
        else:
            residency.admit(key, 1, "second")
    assert (kept(residency, "first"), kept(residency, "second")) == (40, 60)


def test_a_guaranteed_share_is_kept() -> None:
    """A quarter of the budget for each of two: however often the other one uses what it reads."""
    residency = filled(100, "calm", 25)
    for round_ in range(40):
        for number in range(90):
            if (key := f"wild{number}") in residency:
                residency.touch(key)
            else:
                residency.admit(key, 1, "wild")
        residency.touch(f"calm{round_ % 25}")
    assert kept(residency, "calm") == residency.share == 25


def test_who_sleeps_keeps_nothing_for_ever() -> None:
    """A tenant that asked for nothing while the whole budget was admitted makes room like everybody else, also with
    what it had used often."""
    residency = filled(100, "gone", 25)
    for number in range(25):
        residency.touch(f"gone{number}")
        residency.touch(f"gone{number}")
    for number in range(1000):
        residency.admit(f"busy{number}", 1, "busy")
        if number % 3:
            residency.touch(f"busy{number}")
            residency.touch(f"busy{number}")
    assert kept(residency, "gone") <= 10  # what may stand on probation


def test_the_one_with_the_most_on_probation_gives_first() -> None:
    """Of what nobody has used again."""
    residency = filled(90, "large", 60)
    for number in range(30):
        residency.admit(f"middle{number}", 1, "middle")
    assert residency.share == 22
    residency.admit("small", 1, "small")
    assert [(tenant.name, tenant.used) for tenant in residency.tenants()] == [
        ("large", 59),
        ("middle", 30),
        ("small", 1),
    ]


def test_an_entry_larger_than_a_share_costs_its_tenant_everything_else_first() -> None:
    """It has to be served; then the others lose what is still missing."""
    residency = filled(12, "a", 4)
    for tenant in "bc":
        for number in range(4):
            residency.admit(f"{tenant}{number}", 1, tenant)
    victims = residency.admit("whole", 6, "a")
    assert sorted(victims[:4]) == ["a0", "a1", "a2", "a3"]
    assert len(victims) == 6


def test_who_is_above_its_share_takes_nothing_from_who_is_within() -> None:
    """All of its own is in use, so it waits, although others have idle entries; nothing has left."""
    residency = filled(10, "a", 2)
    for number in range(8):
        residency.admit(f"b{number}", 1, "b")
        residency.lease(f"b{number}")
    with pytest.raises(Unavailable, match="of 10 bytes 0 are pinned, 8 in use"):
        residency.admit("b8", 1, "b")
    assert kept(residency, "a") == residency.share == 2


def test_too_large_for_the_budget() -> None:
    """No waiting would help, so it is OutOfSpace, and nothing leaves."""
    residency = full()
    with pytest.raises(OutOfSpace, match="11 bytes do not fit the memory budget of 10 bytes"):
        residency.admit("c", 11, "acme")
    assert len(residency) == 2


def test_everything_is_in_use() -> None:
    """Waiting helps, so it is Unavailable with a time and with what holds the bytes; nothing leaves."""
    residency = full(12)
    residency.admit("c", 2, "acme")
    residency.lease("a")
    residency.pin("c", pinned=True)
    with pytest.raises(Unavailable, match=r"6 bytes are needed .* of 12 bytes 2 are pinned, 5 in use") as caught:
        residency.admit("d", 6, "acme")
    assert caught.value.retry_after == 1
    assert "b" in residency


def test_what_could_not_make_enough_room_keeps_its_place() -> None:
    """A request that is refused changes nothing, not even the order."""
    residency = filled(10, "k", 10)
    residency.lease("k9")
    with pytest.raises(Unavailable):
        residency.admit("large", 10, "k")
    assert [residency.admit(f"next{number}", 1, "k") for number in range(3)] == [["k0"], ["k1"], ["k2"]]


def test_a_lease_of_what_was_removed_holds_nothing() -> None:
    """The same key admitted again is another entry, and the old lease's end does not touch it."""
    residency = full()
    old = residency.lease("a")
    residency.remove("a")
    residency.admit("a", 5, "acme")
    new = residency.lease("a")
    assert not residency.holds("a", old)
    residency.release(old)
    assert (new.leases, residency.holds("a", new), residency.held) == (1, True, 5)


def test_memory_itself_is_exhausted() -> None:
    """What may leave for the tenant leaves, whatever the budget says; others' shares do not."""
    residency = filled(100, "a", 60)
    for number in range(10):
        residency.admit(f"b{number}", 1, "b")
    for number in range(60):
        residency.lease(f"a{number}")
    assert residency.spare("a") == []
    residency.release(residency.entry("a0"))
    assert residency.spare("a") == ["a0"]
    assert sorted(residency.spare("b")) == [f"b{number}" for number in range(10)]


def test_what_proves_itself_while_room_is_made_may_leave() -> None:
    """It moves to the main queue on the way, and is not forgotten there."""
    residency: Residency[str] = Residency(24)
    for key, nbytes in (("b2", 1), ("b3", 1), ("b1", 2)):
        residency.admit(key, nbytes, "b")
        for _ in range(3):
            residency.touch(key)
    assert set(residency.admit("a1", 23, "a")) <= {"b1", "b2", "b3"}
    assert residency.used <= 24
