"""Quotas: what they leave a tenant, and the refusal of what exceeds them.

A transaction that holds the tenant's row decides. While a version is on its way, its `Room` refuses it early.
"""

from dataclasses import dataclass
from typing import Any, Final

import sqlalchemy as sa

from prefix_service.catalog.freed import uncollected
from prefix_service.catalog.records import Quotas
from prefix_service.catalog.schema import adapters, tenants, versions
from prefix_service.errors import QuotaExceeded

_NBYTES: Final = versions.c.weights_bytes + versions.c.key_values_bytes + versions.c.manifest_bytes


@dataclass(frozen=True, slots=True)
class Room:
    """The room that a tenant's quota of bytes leaves: `left` of `quota`, None without a quota; the bytes of the largest
    version of an adapter, which may be published again; and `uncollected`, the deleted bytes still on the disk."""

    left: int | None = None
    quota: int = 0
    largest: int = 0
    uncollected: int = 0

    def require(self, tenant: str, nbytes: int, others: int) -> None:
        """Checks that there is room for a version of at least `nbytes` bytes next to the `others` that its tenant
        publishes now.

        A version that is no larger than the largest of its adapter needs no room if the tenant publishes nothing else:
        its content may be known already.

        Raises:
            QuotaExceeded: there is not.
        """
        if self.left is None or (not others and nbytes <= self.largest):
            return
        if others + nbytes > self.left:
            coming = f" and makes other versions of {others} bytes" if others else ""
            raise _full(tenant, self.quota - self.left, self.quota, coming, f"this version takes at least {nbytes}")
        self.require_collected(tenant, others + nbytes, "what it makes now takes at least")

    def require_collected(self, tenant: str, nbytes: int, takes: str) -> None:
        """Checks that the tenant's versions, another of `nbytes` bytes, and what it deleted and nobody has collected
        yet take at most twice its quota of the disk. `takes` introduces the bytes in the message.

        Raises:
            QuotaExceeded: they take more.
        """
        if self.left is not None and self.uncollected + nbytes > self.quota + self.left:
            raise QuotaExceeded(
                f"tenant {tenant!r} has {self.quota - self.left} of {self.quota} bytes, {self.uncollected} bytes that "
                f"it deleted are still on the disk, and {takes} {nbytes}, more than twice its quota together: try "
                "again once they have been collected, PREFIX_GARBAGE_GRACE after their deletion (an hour unless the "
                "service is set otherwise), or ask the platform for more"
            )


def quotas_of(owner: sa.Row[Any]) -> Quotas:
    """Returns the quotas in a tenant's row."""
    return Quotas(**{name: owner._mapping[name] for name in Quotas.__dataclass_fields__})


def room(connection: sa.Connection, owner: sa.Row[Any], adapter: str) -> Room:
    """Returns what a tenant's quota of bytes leaves at this moment for a version of an adapter.

    Raises:
        QuotaExceeded: the adapter does not exist, and the tenant has as many as it may have.
    """
    _require_fewer_adapters(connection, owner, adapter)
    if owner.max_bytes is None:
        return Room()
    named = sa.and_(adapters.c.tenant_id == owner.id, adapters.c.name == adapter)
    largest = connection.scalar(sa.select(sa.func.max(_NBYTES)).select_from(versions.join(adapters)).where(named))
    return Room(owner.max_bytes - owner.bytes, owner.max_bytes, largest or 0, _uncollected(connection, owner))


def require_room_for_version(connection: sa.Connection, owner: sa.Row[Any], adapter: str, nbytes: int) -> None:
    """Checks that a new version of `nbytes` bytes fits its tenant's quotas, together with the bytes that the tenant
    deleted and that are still on the disk.

    Raises:
        QuotaExceeded: it does not; the message says which quota, what is used of it, and what to do.
    """
    _require_fewer_adapters(connection, owner, adapter)
    require_room(owner, nbytes, "this version takes")
    if owner.max_bytes is not None:
        left = Room(owner.max_bytes - owner.bytes, owner.max_bytes, uncollected=_uncollected(connection, owner))
        left.require_collected(owner.name, nbytes, "this version takes")


def require_room(owner: sa.Row[Any], nbytes: int, takes: str) -> None:
    """Checks that `nbytes` more bytes fit a tenant's quota. `takes` introduces them in the message.

    Raises:
        QuotaExceeded: they do not; the message says what is used of the quota, and what to do.
    """
    if owner.max_bytes is not None and owner.bytes + nbytes > owner.max_bytes:
        raise _full(owner.name, owner.bytes, owner.max_bytes, "", f"{takes} {nbytes}")


def _full(tenant: str, used: int, quota: int, coming: str, takes: str) -> QuotaExceeded:
    return QuotaExceeded(
        f"tenant {tenant!r} has {used} of {quota} bytes{coming}, and {takes}: delete versions, or ask the platform for "
        "more"
    )


def _require_fewer_adapters(connection: sa.Connection, owner: sa.Row[Any], adapter: str) -> None:
    most = owner.max_adapters
    known = sa.select(adapters.c.id).where(adapters.c.tenant_id == owner.id, adapters.c.name == adapter)
    if most is not None and owner.adapters >= most and connection.scalar(known) is None:
        raise QuotaExceeded(
            f"tenant {owner.name!r} has {owner.adapters} adapters and may have {most}: delete one, or ask the platform "
            "for more"
        )


def _uncollected(connection: sa.Connection, owner: sa.Row[Any]) -> int:
    nbytes: int = connection.execute(sa.select(uncollected()).where(tenants.c.id == owner.id)).scalar_one()
    return nbytes
