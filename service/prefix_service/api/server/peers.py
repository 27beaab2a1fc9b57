"""Decides which connections stay open when there are too many. Pure state."""

import ipaddress
from collections import Counter, OrderedDict
from collections.abc import Hashable
from typing import Final, Generic, TypeVar

from prefix_service.errors import Overloaded

C = TypeVar("C", bound=Hashable)

_MOST_REFUSED: Final = 64


class Peers(Generic[C]):
    """Counts the connections of each peer, up to `most` in total.

    A connection is idle while no request is in progress: before its first head, between requests, and after an answer
    whose request still has a body to come. If there is one connection too many, the peer with the most connections,
    among peers with idle ones, loses the one that has been idle longest. If none is idle, a peer with more than half of
    all connections loses the one whose reader has been stalled longest.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._peer_of: dict[C, str] = {}
        self._count: Counter[str] = Counter()
        self._idle: dict[str, OrderedDict[C, None]] = {}  # only of peers that have some, as is `_stalled`
        self._stalled: dict[str, OrderedDict[C, None]] = {}
        self._refused: set[C] = set()

    def __len__(self) -> int:
        return len(self._peer_of)

    def open(self, connection: C, peer: str) -> C | None:
        """Counts a new connection as idle. Returns the connection to close for it, which is no longer counted, or None.

        Raises:
            Overloaded: there are too many and none is idle; the new one is not counted.
        """
        victim = None
        if len(self._peer_of) >= self.most:
            victim = self._victim()
            self.close(victim)
        self._peer_of[connection] = peer
        self._count[peer] += 1
        self.idle(connection)
        return victim

    def _victim(self) -> C:
        if self._idle:
            return next(iter(self._idle[max(self._idle, key=self._count.__getitem__)]))
        for peer, stalled in self._stalled.items():
            if self._count[peer] > self.most // 2:
                return next(iter(stalled))
        raise Overloaded(f"{self.most} connections are open, and all have requests in progress: try again")

    def may_read_refusal(self, connection: C) -> bool:
        """Returns whether a refused connection may stay for a moment to read the reason, as a few may.

        Close it in any case.
        """
        if len(self._refused) >= _MOST_REFUSED:
            return False
        self._refused.add(connection)
        return True

    def close(self, connection: C) -> None:
        """Stops counting a connection, if it is counted."""
        self._refused.discard(connection)
        if (peer := self._peer_of.get(connection)) is None:
            return
        self.busy(connection)
        del self._peer_of[connection]
        self._count[peer] -= 1
        if not self._count[peer]:
            del self._count[peer]

    def idle(self, connection: C) -> None:
        """Notes that a connection has no request in progress; one that is idle already keeps its position."""
        self._move(connection, self._stalled, self._idle)

    def stalled(self, connection: C) -> None:
        """Notes that a connection's reader takes nothing of an answer in progress; a stalled one keeps its position."""
        self._move(connection, self._idle, self._stalled)

    def busy(self, connection: C) -> None:
        """Notes that a connection has a request in progress."""
        self._move(connection, self._idle)
        self._move(connection, self._stalled)

    def _move(
        self,
        connection: C,
        old: dict[str, OrderedDict[C, None]],
        new: dict[str, OrderedDict[C, None]] | None = None,
    ) -> None:
        if (peer := self._peer_of.get(connection)) is None:
            return
        if (queue := old.get(peer)) is not None:
            queue.pop(connection, None)
            if not queue:
                del old[peer]
        if new is not None:
            new.setdefault(peer, OrderedDict()).setdefault(connection)


def peer_name(address: str | None) -> str:
    """Returns the peer of an address: an IPv4 address, or an IPv6 address's /64 network, since one host has all of it.

    All connections through a Unix socket belong to one peer.
    """
    if address is None or ":" not in address:
        return address or ""
    found = ipaddress.IPv6Address(address.partition("%")[0])
    if found.ipv4_mapped is not None:
        return str(found.ipv4_mapped)
    return str(ipaddress.IPv6Network((found, 64), strict=False))
