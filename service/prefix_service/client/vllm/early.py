"""Fetches that begin while the service is still asked which version a reference means. Pure state.

Bytes are charged to a tenant once their version, and so their size, is known. Until then a fetch is early: there are
few of them, with few bytes together, each lasts no longer than its question, and the workers use its bytes only if they
are the version's.
"""

from typing import Final

from prefix_service.client.vllm.requests import References
from prefix_service.client.vllm.turns import Share
from prefix_service.prefix.references import parse_qualified

_MOST: Final = 8  # in parallel; one tenant takes half of them at most


class Early:
    """The early fetches that run, and the orders about them that the workers have not been given."""

    def __init__(self) -> None:
        self._share = Share(_MOST)
        self._tenants: dict[int, str] = {}
        self._last_number = 0
        self._begun: list[tuple[int, References]] = []
        self._given_up: list[int] = []

    def begin(self, references: References) -> int | None:
        """Orders an early fetch of references; returns its number, or None if too many run."""
        tenant, _ = parse_qualified(references[0])
        if not self._share.has_room(tenant, 1):
            return None
        self._share.take(tenant, 1)
        self._last_number += 1
        self._tenants[self._last_number] = tenant
        self._begun.append((self._last_number, references))
        return self._last_number

    def end(self, number: int, *, is_used: bool) -> None:
        """Notes that an early fetch has become a parcel's, or that nobody needs it."""
        self._share.give(self._tenants.pop(number), 1)
        if not is_used:
            self._given_up.append(number)

    def take_orders(self) -> tuple[list[tuple[int, References]], list[int]]:
        """Returns the fetches to begin, and those to give up, since the last call."""
        orders = self._begun, self._given_up
        self._begun, self._given_up = [], []
        return orders
