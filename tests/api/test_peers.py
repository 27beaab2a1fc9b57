"""`service.api.peers`: which connection is closed for another."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from service.api.peers import Peers, peer_name
from service.errors import Overloaded

MOST = 6


class Rules(RuleBasedStateMachine):
    """Against a model: connections in the order in which they became idle."""

    def __init__(self) -> None:
        super().__init__()
        self.peers: Peers[int] = Peers(MOST)
        self.peer: dict[int, str] = {}
        self.idle: list[int] = []
        self.number = 0

    def count(self, peer: str) -> int:
        return sum(other == peer for other in self.peer.values())

    @rule(peer=st.sampled_from("abc"))
    def open(self, peer: str) -> None:
        """Only one too many closes another: the longest idle of the largest peer that has idle ones."""
        self.number += 1
        is_full = len(self.peer) == MOST
        try:
            victim = self.peers.open(self.number, peer)
        except Overloaded:
            assert is_full
            assert not self.idle
            return
        assert (victim is not None) == is_full
        if victim is not None:
            most = max(self.count(self.peer[other]) for other in self.idle)
            owner = self.peer[victim]
            assert self.count(owner) == most
            assert victim == next(other for other in self.idle if self.peer[other] == owner)
            self.idle.remove(victim)
            del self.peer[victim]
        self.peer[self.number] = peer
        self.idle.append(self.number)

    @precondition(lambda self: self.peer)
    @rule(data=st.data(), idle=st.booleans())
    def use(self, data: st.DataObject, idle: bool) -> None:
        connection = data.draw(st.sampled_from(sorted(self.peer)))
        (self.peers.idle if idle else self.peers.busy)(connection)
        if idle and connection not in self.idle:
            self.idle.append(connection)
        elif not idle and connection in self.idle:
            self.idle.remove(connection)

    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        """Also one that is not counted: it was closed for another, or refused."""
        connection = data.draw(st.integers(1, max(1, self.number)))
        self.peers.close(connection)
        self.peers.busy(connection)
        self.peers.idle(connection)
        self.peer.pop(connection, None)
        if connection in self.idle:
            self.idle.remove(connection)

    @invariant()
    def none_is_lost(self) -> None:
        assert len(self.peers) == len(self.peer) <= MOST


# Any sequence of calls: no more than the most, and nobody who has a request in progress is closed.
TestRules = Rules.TestCase
TestRules.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


def test_a_few_that_are_refused_may_stay_to_read_why() -> None:
    """Their places come back when they are closed."""
    peers: Peers[int] = Peers(1)
    assert [peers.may_tell(number) for number in range(70)].count(True) == 64
    peers.close(0)
    assert peers.may_tell(70)
    assert not peers.may_tell(71)


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::1", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        (None, ""),
    ],
)
def test_names_of_peers(address: str | None, name: str) -> None:
    """One host has all addresses of a /64; IPv4 is one peer however it came in."""
    assert peer_name(address) == name
