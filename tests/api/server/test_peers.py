"""`api.server.peers`: which connection is closed for another."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from prefix_service.api.server.peers import Peers, peer_name
from prefix_service.errors import Overloaded

MOST = 6


class Rules(RuleBasedStateMachine):
    """Against a model: connections in the order in which they became idle, or their readers took nothing any more."""

    def __init__(self) -> None:
        super().__init__()
        self.peers: Peers[int] = Peers(MOST)
        self.peer: dict[int, str] = {}
        self.idle: list[int] = []
        self.stalled: list[int] = []
        self.number = 0

    def count(self, peer: str) -> int:
        return sum(other == peer for other in self.peer.values())

    @rule(peer=st.sampled_from("abc"))
    def open(self, peer: str) -> None:
        """Only one too many closes another: the longest idle of the largest peer that has idle ones; if none is idle,
        the longest stalled of a peer with more than half of all."""
        self.number += 1
        is_full = len(self.peer) == MOST
        try:
            victim = self.peers.open(self.number, peer)
        except Overloaded:
            assert is_full
            assert not self.idle
            assert all(self.count(self.peer[other]) <= MOST / 2 for other in self.stalled)
            return
        assert (victim is not None) == is_full
        if victim is not None:
            owner = self.peer[victim]
            if self.idle:
                assert self.count(owner) == max(self.count(self.peer[other]) for other in self.idle)
            else:
                assert self.count(owner) > MOST / 2
            assert victim == next(other for other in self.idle or self.stalled if self.peer[other] == owner)
            self.forget(victim)
        self.peer[self.number] = peer
        self.idle.append(self.number)

    @precondition(lambda self: self.peer)
    @rule(data=st.data(), now=st.sampled_from(["idle", "stalled", "busy"]))
    def use(self, data: st.DataObject, now: str) -> None:
        connection = data.draw(st.sampled_from(sorted(self.peer)))
        getattr(self.peers, now)(connection)
        for state, queue in (("idle", self.idle), ("stalled", self.stalled)):
            if now == state and connection not in queue:
                queue.append(connection)
            elif now != state and connection in queue:
                queue.remove(connection)

    def forget(self, connection: int) -> None:
        self.peer.pop(connection, None)
        for queue in (self.idle, self.stalled):
            if connection in queue:
                queue.remove(connection)

    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        """Also one that is not counted: it was closed for another, or refused."""
        connection = data.draw(st.integers(1, max(1, self.number)))
        self.peers.close(connection)
        self.peers.busy(connection)
        self.peers.stalled(connection)
        self.peers.idle(connection)
        self.forget(connection)

    @invariant()
    def none_is_lost(self) -> None:
        assert len(self.peers) == len(self.peer) <= MOST


# Any sequence of calls: no more than the most, and nobody who has a request in progress is closed.
TestRules = Rules.TestCase
TestRules.settings = settings(stateful_step_count=40)


def test_a_few_that_are_refused_may_stay_to_read_why() -> None:
    """Their places come back when they are closed."""
    peers: Peers[int] = Peers(1)
    assert [peers.may_read_refusal(number) for number in range(70)].count(True) == 64
    peers.close(0)
    assert peers.may_read_refusal(70)
    assert not peers.may_read_refusal(71)


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
