"""Parts that several queries share: the rows of versions, and finding adapters and aliases by name."""

from collections.abc import Sequence
from typing import Any, Final

import sqlalchemy as sa

from prefix_service.catalog.records import Version
from prefix_service.catalog.schema import adapters, aliases, descriptions, tenants, versions
from prefix_service.errors import NotFound

OWNED: Final = versions.join(adapters, versions.c.adapter_id == adapters.c.id).join(
    tenants, adapters.c.tenant_id == tenants.c.id
)
"""Versions with their adapters and tenants."""

PRESENT: Final = sa.not_(sa.or_(adapters.c.deleted, tenants.c.deleted))
"""Whether neither the adapter nor its tenant was deleted; their rows stay until the collector has removed them."""

VERSION: Final = (
    sa.select(
        versions,
        tenants.c.name.label("tenant"),
        adapters.c.name.label("adapter"),
        (sa.func.coalesce(descriptions.c.fingerprint, "") != "").label("has_fingerprint"),
    )
    .select_from(OWNED.outerjoin(descriptions, descriptions.c.version_id == versions.c.id))
    .where(PRESENT)
)
"""The rows of versions, as `version_of` takes them."""


def version_of(row: sa.Row[Any]) -> Version:
    """Returns the record of a row of `VERSION`."""
    return Version(**{name: row._mapping[name] for name in Version.__dataclass_fields__})


def missing(tenant: str, adapter: str) -> NotFound:
    """Returns the error of an adapter that does not exist."""
    return NotFound(f"there is no {tenant}/{adapter}")


def find_adapter(connection: sa.Connection, tenant: str, adapter: str) -> int:
    """Returns an adapter's id.

    Raises:
        NotFound: there is no such adapter.
    """
    query = sa.select(adapters.c.id).join(tenants).where(tenants.c.name == tenant, adapters.c.name == adapter)
    found: int | None = connection.scalar(query)
    if found is None:
        raise missing(tenant, adapter)
    return found


def aliases_of(connection: sa.Connection, adapter_ids: Sequence[int]) -> dict[int, dict[str, int]]:
    """Returns the aliases of each adapter, in the order of their names, and the version numbers they point at."""
    query = sa.select(aliases).where(aliases.c.adapter_id.in_(adapter_ids)).order_by(aliases.c.name)
    named: dict[int, dict[str, int]] = {found: {} for found in adapter_ids}
    for row in connection.execute(query):
        named[row.adapter_id][row.name] = row.number
    return named
