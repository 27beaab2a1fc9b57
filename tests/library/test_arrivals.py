"""`library.arrivals`: versions that are being made count as used, and only while they are made."""

import contextlib

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from prefix_service.catalog.quotas import Room
from prefix_service.catalog.records import COMMAND_LINE, Principal
from prefix_service.errors import NotFound, QuotaExceeded, Unauthenticated
from prefix_service.library.arrivals import Arrival, Arrivals

LEFT = 20
nbytes = st.integers(0, LEFT + 2)


class Making(RuleBasedStateMachine):
    """Against a model: what each version in progress holds."""

    def __init__(self) -> None:
        super().__init__()
        self.arrivals = Arrivals()
        self.held: list[tuple[str, Arrival, contextlib.ExitStack, int]] = []

    def others(self, tenant: str, own: Arrival | None) -> int:
        return sum(held for name, arrival, _, held in self.held if name == tenant and arrival is not own)

    @rule(tenant=st.sampled_from("ab"), nbytes=nbytes)
    def begin(self, tenant: str, nbytes: int) -> None:
        stack, others = contextlib.ExitStack(), self.others(tenant, None)
        try:
            arrival = stack.enter_context(self.arrivals.begin(tenant, COMMAND_LINE, Room(LEFT, 100), nbytes))
        except QuotaExceeded:
            assert nbytes
            assert others + nbytes > LEFT
        else:
            assert others + nbytes <= LEFT or not nbytes
            self.held.append((tenant, arrival, stack, nbytes))

    @precondition(lambda self: self.held)
    @rule(data=st.data(), nbytes=nbytes)
    def grow(self, data: st.DataObject, nbytes: int) -> None:
        index = data.draw(st.integers(0, len(self.held) - 1))
        tenant, arrival, stack, held = self.held[index]
        fits = self.others(tenant, arrival) + nbytes <= LEFT or nbytes <= held
        try:
            arrival.hold(nbytes)
        except QuotaExceeded:
            assert not fits
        else:
            assert fits
            self.held[index] = tenant, arrival, stack, max(held, nbytes)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), early=st.booleans())
    def end(self, data: st.DataObject, early: bool) -> None:
        _, arrival, stack, _ = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        if early:
            arrival.end()
        stack.close()

    @invariant()
    def all_are_counted(self) -> None:
        assert all(self.arrivals.of(tenant) == self.others(tenant, None) for tenant in "ab")
        assert set(self.arrivals._bytes) == {tenant for tenant, _, _, held in self.held if held}


TestArrivals = Making.TestCase


def test_what_may_be_known_needs_no_room() -> None:
    """One version as large as the largest of its adapter, at a time: it may be the same again."""
    arrivals, full = Arrivals(), Room(left=-5, quota=100, largest=30)
    with arrivals.begin("a", COMMAND_LINE, full, 30) as first:
        with (
            pytest.raises(
                QuotaExceeded, match=r"'a' has 105 of 100 bytes and makes other versions of 30 bytes, and th"
            ),
            arrivals.begin("a", COMMAND_LINE, full, 1),
        ):
            pass
        with pytest.raises(QuotaExceeded, match=r"'a' has 105 of 100 bytes, and this version takes at least 31: dele"):
            first.hold(31)
    assert arrivals.of("a") == 0


def test_a_tenant_without_a_quota_is_not_held_up() -> None:
    """However much it sends."""
    with Arrivals().begin("a", COMMAND_LINE, Room(), 1 << 60) as arrival:
        arrival.hold(1 << 62)


def test_what_lost_its_tenant_or_key_counts_no_more_and_ends() -> None:
    """A namesake of a deleted tenant has its whole quota at once; the others are left alone."""
    arrivals, full = Arrivals(), Room(100, 100)
    theirs = Principal("1", "a", "write", tenant_id=1)
    with (
        arrivals.begin("a", theirs, full, 60) as first,
        arrivals.begin("a", COMMAND_LINE, Room(), 30) as second,
        arrivals.begin("b", Principal("2", "b", "write", tenant_id=2), full, 50) as revoked,
        arrivals.begin("b", Principal("3", "b", "write", tenant_id=2), full, 40) as kept,
    ):
        arrivals.refuse({"a"}, {"2"})
        assert (arrivals.of("a"), arrivals.of("b")) == (0, 40)
        for arrival, error in ((first, Unauthenticated), (second, NotFound), (revoked, Unauthenticated)):
            with pytest.raises(error, match="while the request was under way"):
                arrival.hold(70)
        kept.hold(45)
    assert (arrivals.of("a"), arrivals.of("b")) == (0, 0)
