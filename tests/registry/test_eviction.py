"""`registry.eviction` is pure state under a budget of bytes that tenants share."""

from collections.abc import Collection
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from prefix_service.errors import OutOfSpace, Overloaded, Unavailable
from prefix_service.registry.accounts import Entry
from prefix_service.registry.eviction import Residency

BUDGET = 24
KEYS = [tenant + name for tenant in "abc" for name in "123456"]
keys = st.sampled_from(KEYS)


@dataclass(eq=False)
class Known:
    """The model's view of an entry: who leases it, even after it was removed."""

    key: str
    nbytes: int
    leases: list[Entry[str]] = field(default_factory=list)
    pinned: bool = False

    @property
    def tenant(self) -> str:
        return self.key[0]

    @property
    def held(self) -> bool:
        return self.pinned or bool(self.leases)


class Rules(RuleBasedStateMachine):
    """A model of the entries, whose keys begin with the letter of their tenant."""

    def __init__(self) -> None:
        super().__init__()
        self.residency: Residency[str] = Residency(BUDGET)
        self.known: dict[str, Known] = {}
        self.removed: list[Known] = []  # and still leased
        self.admitted = 0
        self.seen: dict[str, int] = {}

    @property
    def all(self) -> list[Known]:
        return [*self.known.values(), *self.removed]

    @property
    def held(self) -> int:
        return sum(entry.nbytes for entry in self.all if entry.held)

    def leased(self, tenant: str) -> int:
        return sum(entry.nbytes for entry in self.all if entry.tenant == tenant and entry.leases)

    def pinned(self, tenants: str) -> int:
        return sum(entry.nbytes for entry in self.all if entry.tenant in tenants and entry.pinned)

    def used(self, tenants: str, without: Collection[str] = ()) -> int:
        return sum(entry.nbytes for entry in self.all if entry.tenant in tenants and entry.key not in without)

    def spared(self, tenant: str, requester: str, gone: list[str], share: int) -> bool:
        """Returns whether a tenant is within its share, and active."""
        awake = self.admitted - self.seen[tenant] <= BUDGET
        return tenant != requester and self.used(tenant, gone) <= share and awake

    def check_victims(self, tenant: str, victims: list[str], share: int) -> None:
        """Checks each victim in order: it was not held, and nobody within the share lost it to a tenant above the
        share, or while anything else could be evicted.
        """
        loose = {key for key, entry in self.known.items() if not entry.held}
        assert set(victims) <= loose
        for number, victim in enumerate(victims):
            gone = victims[:number]
            if not self.spared(victim[0], tenant, gone, share):
                continue
            assert self.used(tenant, gone) <= share
            assert all(self.spared(key[0], tenant, gone, share) for key in loose - set(gone))

    def share(self, tenant: str) -> int:
        return BUDGET // (2 * len({entry.tenant for entry in self.all} | {tenant}))

    def may_lease(self, tenant: str, nbytes: int, *, held: bool, own: int) -> bool:
        """Returns whether a tenant may lease: as much as would then stay free, or one request's need if it leases
        nothing else and that is free.
        """
        free = BUDGET - self.held - (0 if held else nbytes)
        return free >= 0 if self.leased(tenant) <= own else self.leased(tenant) + nbytes <= free

    @rule(key=keys, nbytes=st.one_of(st.integers(1, 5), st.integers(0, BUDGET // 2 + 2)), own=st.integers(0, 6))
    def admit(self, key: str, nbytes: int, own: int) -> None:
        if key in self.known:
            return
        tenant = key[0]
        share, free = self.share(tenant), BUDGET - self.used("abc")
        may = self.may_lease(tenant, nbytes, held=False, own=own)
        try:
            victims = self.residency.admit(key, nbytes, tenant, own)
        except OutOfSpace:
            assert nbytes > BUDGET // 2
        except Overloaded:
            assert not may
        except Unavailable:
            assert may
            self.check_refusal(tenant, nbytes, free, share)
        else:
            assert may
            self.check_victims(tenant, victims, share)
            assert not victims or free + sum(self.known[victim].nbytes for victim in victims[:-1]) < nbytes
            for victim in victims:
                del self.known[victim]
            self.known[key] = Known(key, nbytes)
            self.admitted += nbytes
            self.seen[tenant] = self.admitted

    def check_refusal(self, tenant: str, nbytes: int, free: int, share: int) -> None:
        """Checks that evicting its own would not suffice, nor, while it is within its share, evicting everything."""
        loose = [entry for entry in self.known.values() if not entry.held]
        own = sum(entry.nbytes for entry in loose if entry.tenant == tenant)
        assert free + own < nbytes
        if self.used(tenant) <= share:
            assert free + sum(entry.nbytes for entry in loose) < nbytes

    @rule(tenant=st.sampled_from("abc"))
    def evict_all_for(self, tenant: str) -> None:
        share = self.share(tenant)
        victims = self.residency.evict_all_for(tenant)
        self.check_victims(tenant, victims, share)
        for victim in victims:
            del self.known[victim]
        assert all(entry.held for entry in self.known.values() if entry.tenant == tenant)

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def touch(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.known)))
        self.residency.touch(key)
        self.seen[key[0]] = self.admitted

    @precondition(lambda self: self.known)
    @rule(data=st.data(), own=st.integers(0, 6))
    def lease(self, data: st.DataObject, own: int) -> None:
        """Leases an entry; only its first lease costs bytes."""
        entry = self.known[data.draw(st.sampled_from(sorted(self.known)))]
        may = bool(entry.leases) or self.may_lease(entry.tenant, entry.nbytes, held=entry.pinned, own=own)
        try:
            entry.leases.append(self.residency.lease(entry.key, own))
        except Overloaded:
            assert not may
        else:
            assert may

    @precondition(lambda self: any(entry.leases for entry in self.all))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        entry = data.draw(st.sampled_from([entry for entry in self.all if entry.leases]))
        self.residency.release(entry.leases.pop())
        if entry in self.removed and not entry.leases:
            self.removed.remove(entry)

    @precondition(lambda self: self.known)
    @rule(data=st.data(), pinned=st.booleans())
    def pin(self, data: st.DataObject, pinned: bool) -> None:
        """Pins or unpins an entry: a tenant may pin as much as would then stay unpinned of the pinnable half."""
        entry = self.known[data.draw(st.sampled_from(sorted(self.known)))]
        left = BUDGET // 2 - self.pinned("abc") - entry.nbytes
        may = not pinned or entry.pinned or self.pinned(entry.tenant) + entry.nbytes <= left
        try:
            self.residency.pin(entry.key, pinned=pinned)
        except OutOfSpace:
            assert not may
        else:
            assert may
            entry.pinned = pinned

    @rule(key=keys)
    def remove(self, key: str) -> None:
        self.residency.remove(key)
        entry = self.known.pop(key, None)
        if entry is not None and entry.leases:
            entry.pinned = False
            self.removed.append(entry)

    @invariant()
    def the_budget_is_never_exceeded(self) -> None:
        assert 0 <= self.residency.used == self.used("abc") <= BUDGET

    @invariant()
    def nothing_is_lost_and_nothing_held_has_left(self) -> None:
        assert {key for key in KEYS if key in self.residency} == set(self.known)
        assert len(self.residency) == len(self.known)
        for key, entry in self.known.items():
            assert self.residency.is_pinned(key) == entry.pinned
            assert all(self.residency.holds(key, lease) for lease in entry.leases)

    @invariant()
    def the_bytes_of_all_tenants_add_up(self) -> None:
        tenants = {tenant.name: tenant for tenant in self.residency.tenants()}
        assert set(tenants) == {entry.tenant for entry in self.all}
        for name, tenant in tenants.items():
            assert (tenant.used, tenant.leased, tenant.pinned) == (
                self.used(name), self.leased(name), self.pinned(name),
            )  # fmt: skip
        holdings = self.residency.holdings
        assert (holdings.pinned, holdings.held) == (self.pinned("abc"), self.held)


# In any sequence of calls the budget holds, what is leased or pinned stays, no tenant takes from another's share, and
# none holds more than is left to the others.
TestRules = Rules.TestCase
TestRules.settings = settings(max_examples=2 * settings().max_examples, stateful_step_count=40)


def full(budget: int = 10) -> Residency[str]:
    residency: Residency[str] = Residency(budget)
    for key in "ab":
        assert residency.admit(key, 5, "acme") == []
    return residency


def filled(budget: int, tenant: str, count: int) -> Residency[str]:
    """Returns a residency with `count` entries of one byte, `<tenant>0` and on."""
    residency: Residency[str] = Residency(budget)
    for number in range(count):
        residency.admit(f"{tenant}{number}", 1, tenant)
    return residency


def kept(residency: Residency[str], tenant: str) -> int:
    return sum(key.startswith(tenant) for key, _ in residency.items())


def test_the_first_to_come_leaves_first() -> None:
    """If nothing was used twice, the oldest entry is evicted, and no more than must be."""
    assert full().admit("c", 1, "acme") == ["a"]


def test_what_was_used_twice_on_probation_stays() -> None:
    """An entry that was used twice moves to the main queue at its turn; one use might be a burst."""
    residency = full()
    residency.touch("a")
    residency.touch("a")
    assert residency.admit("c", 1, "acme") == ["b"]


def test_a_scan_passes_through_a_tenth() -> None:
    """A scan of a hundred keys leaves the proven entries resident."""
    residency = filled(20, "hot", 18)
    for key, _ in list(residency.items()):
        residency.touch(key)
        residency.touch(key)
    for number in range(100):
        residency.admit(f"cold{number}", 1, "acme")
    assert (kept(residency, "hot"), kept(residency, "cold")) == (18, 2)


def test_what_comes_back_soon_is_proven() -> None:
    """An entry that is asked for soon after its eviction counts as used again."""
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
    """The next entry is evicted instead of a leased or pinned one."""
    residency = filled(8, "k", 8)
    if how == "lease":
        residency.lease("k0")
    else:
        residency.pin("k0", pinned=True)
    assert residency.admit("next", 1, "k") == ["k1"]


def test_a_tenants_scan_takes_a_tenth_of_its_share() -> None:
    """A scan displaces a tenth of its share, and then only itself, although another tenant fills the budget."""
    residency = filled(1000, "hot", 1000)
    for number in range(5000):
        residency.admit(f"cold{number}", 1, "scanner")
    assert 50 <= kept(residency, "cold") <= 51  # a tenth of 500
    assert kept(residency, "hot") >= 949


def test_what_is_used_takes_the_place_of_what_is_not() -> None:
    """Beyond the guaranteed shares memory goes to the tenant that uses it: a second tenant that reads again gets all
    that it needs from a first one that does not.
    """
    residency = filled(100, "first", 100)
    for number in [*range(48)] * 3 + [*range(48, 60)] * 20:
        if (key := f"second{number}") in residency:
            residency.touch(key)
        else:
            residency.admit(key, 1, "second")
    assert (kept(residency, "first"), kept(residency, "second")) == (40, 60)


def test_a_guaranteed_share_is_kept() -> None:
    """Each of two tenants keeps a quarter of the budget, however often the other uses what it reads."""
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
    """A tenant that asked for nothing while the whole budget was admitted once loses its share, even of entries that it
    had used often.
    """
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
    """The tenant with the most bytes on probation loses the first entry."""
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
    """An entry larger than the share evicts all of its tenant's others, and then what is missing from other tenants."""
    residency = filled(12, "a", 4)
    for tenant in "bc":
        for number in range(4):
            residency.admit(f"{tenant}{number}", 1, tenant)
    victims = residency.admit("whole", 6, "a")
    assert sorted(victims[:4]) == ["a0", "a1", "a2", "a3"]
    assert len(victims) == 6


def test_who_is_above_its_share_takes_nothing_from_who_is_within() -> None:
    """A tenant above its share, whose entries are all in use, evicts none of another's idle entries and has to wait."""
    residency = filled(16, "a", 2)
    residency.admit("c", 8, "c")
    residency.lease("c")
    residency.admit("b1", 3, "b")
    residency.lease("b1")
    assert (residency.used, residency.share) == (13, 2)
    with pytest.raises(Unavailable, match="of 16 bytes 0 are pinned, 11 in use"):
        residency.admit("b2", 4, "b", own=3)
    assert kept(residency, "a") == 2


def test_too_large_for_the_budget() -> None:
    """An entry above a half of the budget raises OutOfSpace, because waiting would not help, and evicts nothing."""
    residency = full()
    with pytest.raises(OutOfSpace, match="6 bytes are needed in memory, and one request may hold 5"):
        residency.admit("c", 6, "acme")
    assert len(residency) == 2


def test_everything_is_in_use() -> None:
    """If all entries are held, Unavailable has a time to retry and what holds the bytes, and nothing is evicted."""
    residency: Residency[str] = Residency(12)
    for key, nbytes in (("a1", 5), ("b1", 2), ("b2", 3), ("c1", 2)):
        residency.admit(key, nbytes, key[0])
    residency.lease("a1")
    residency.pin("b1", pinned=True)
    residency.lease("b2")
    with pytest.raises(
        Unavailable, match=r"3 bytes are needed in memory, .* tenant 'd' .* hold 0 of 12 bytes"
    ) as caught:
        residency.admit("d1", 3, "d")
    assert caught.value.retry_after == 1
    assert len(residency) == 4


def test_one_tenants_readers_leave_a_half_to_others() -> None:
    """One tenant's leases may hold a half of the budget, a second one's a half of the rest, whatever is resident."""
    residency = filled(16, "a", 16)
    for number in range(8):
        residency.lease(f"a{number}")
    with pytest.raises(Overloaded, match=r"tenant 'a' .* hold 8 of 16 bytes"):
        residency.lease("a8")
    for number in range(4):
        residency.admit(f"b{number}", 1, "b")
        residency.lease(f"b{number}")
    with pytest.raises(Overloaded, match=r"tenant 'b' .* hold 4 of 16 bytes"):
        residency.admit("b4", 1, "b")
    assert len(residency.admit("c", 4, "c")) == 4
    residency.lease("a0")  # once more costs nothing


def test_what_could_not_make_enough_room_keeps_its_place() -> None:
    """A refused request changes nothing, not even the order."""
    residency = filled(24, "k", 9)
    residency.admit("c", 8, "c")
    residency.lease("c")
    for number in range(3):
        residency.admit(f"other{number}", 1, "other")
    for number in range(4, 9):
        residency.lease(f"k{number}")
    with pytest.raises(Unavailable, match="no more can be evicted"):
        residency.admit("large", 9, "k", own=5)
    assert [residency.admit(f"next{nbytes}", nbytes, "k", own=5) for nbytes in (5, 1)] == [["k0"], ["k1"]]


def test_what_was_removed_counts_until_its_last_lease_ends() -> None:
    """A removed entry counts while it is leased; the same key admitted again is an entry of its own."""
    residency: Residency[str] = Residency(20)
    residency.admit("a", 5, "acme")
    old = residency.lease("a")
    residency.remove("a")
    assert (residency.used, residency.holdings.held, len(residency)) == (5, 5, 0)
    residency.admit("a", 5, "acme")
    new = residency.lease("a")
    assert not residency.holds("a", old)
    assert (residency.used, residency.holdings.held) == (10, 10)
    residency.release(old)
    assert (new.leases, residency.holds("a", new), residency.used, residency.holdings.held) == (1, True, 5, 5)


def test_memory_itself_is_exhausted() -> None:
    """`evict_all_for` evicts everything that the tenant may displace, but nothing of others' shares."""
    residency = filled(100, "a", 40)
    for number in range(10):
        residency.admit(f"b{number}", 1, "b")
    for number in range(40):
        residency.lease(f"a{number}")
    assert residency.evict_all_for("a") == []
    residency.release(residency.entry("a0"))
    assert residency.evict_all_for("a") == ["a0"]
    assert sorted(residency.evict_all_for("b")) == [f"b{number}" for number in range(10)]


def test_what_proves_itself_while_room_is_made_may_leave() -> None:
    """An entry that moves to the main queue while room is made can still be evicted."""
    residency: Residency[str] = Residency(24)
    residency.admit("c", 10, "c")
    residency.lease("c")
    for key, nbytes in (("b2", 1), ("b3", 1), ("b1", 2)):
        residency.admit(key, nbytes, "b")
        for _ in range(3):
            residency.touch(key)
    assert set(residency.admit("a1", 12, "a")) <= {"b1", "b2", "b3"}
    assert residency.used <= 24
