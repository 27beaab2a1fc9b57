"""Tenants, their keys and those of the platform, and what callers may still do."""

from datetime import datetime

from prefix_service.catalog.authority import prove
from prefix_service.catalog.database import Database
from prefix_service.catalog.keys import Keyring
from prefix_service.catalog.records import Key, Principal, Quotas, Scope, Tenant
from prefix_service.catalog.tenants import Tenants
from prefix_service.catalog.threads import read_catalog, write_catalog


class Tenancy:
    """The key methods take None as `tenant` for the platform. Any method may also raise OutOfSpace or StorageFailed,
    when the catalog refuses.
    """

    def __init__(self, database: Database, tenants: Tenants, keyring: Keyring) -> None:
        self._database, self._tenants, self._keyring = database, tenants, keyring

    async def require_authority(self, by: Principal) -> None:
        """Checks the caller's authority once more: after the body has arrived, and before anything is read or loaded
        for it.

        The transaction that writes checks it again.

        Raises:
            Unauthenticated, NotFound: `by` has lost its authority.
        """
        await read_catalog(prove, self._database, by)

    async def tenant_id(self, name: str) -> int:
        """Returns the id of a tenant.

        Raises:
            NotFound: there is no such tenant.
        """
        return await read_catalog(self._tenants.require, name)

    async def tenant(self, name: str) -> Tenant:
        """Returns a tenant with its quotas and what it has.

        Raises:
            NotFound: there is no such tenant.
        """
        return await read_catalog(self._tenants.get, name)

    async def requests_per_second(self, name: str) -> int | None:
        """Returns how many requests a tenant may send in a second; None for no limit, or no such tenant."""
        return await read_catalog(self._tenants.requests_per_second, name)

    async def put(self, name: str, by: Principal, quotas: Quotas | None) -> bool:
        """Makes a tenant, or gives one other quotas; returns whether it is new. None leaves the quotas as they are.

        Raises:
            Unauthenticated: `by` has lost its authority.
            NotFound: the tenant existed when the request began, and has been deleted since.
        """
        return await write_catalog(self._tenants.put, name, by, quotas)

    async def delete(self, name: str, by: Principal) -> None:
        """Deletes a tenant with everything it has. Transfers in progress complete.

        Raises:
            NotFound: there is no such tenant.
            Unauthenticated: `by` has lost its authority.
        """
        await write_catalog(self._tenants.delete, name, by)

    async def key(self, tenant: str | None, key_id: str) -> Key:
        """Returns a key.

        Raises:
            NotFound: this owner has no such key, or there is no such owner.
        """
        return await read_catalog(self._keyring.get, tenant, key_id)

    async def create_key(
        self, tenant: str | None, scope: Scope, name: str, by: Principal, expires: datetime | None
    ) -> tuple[Key, str]:
        """Makes a key; returns it, and its text, which nothing returns again. A naive `expires` is in UTC.

        Raises:
            InvalidRequest: `expires` is not in the future, or a tenant's key would have the scope `metrics`.
            Unauthenticated: `by` has lost its authority.
            NotFound: there is no such tenant.
            Conflict: it has as many keys as it may have.
        """
        return await write_catalog(self._keyring.create, tenant, scope, name, by, expires)

    async def shorten_key(self, tenant: str | None, key_id: str, expires: datetime, by: Principal) -> Key:
        """Gives a key an end, or an earlier one than it has; returns the key. A naive `expires` is in UTC.

        Raises:
            InvalidRequest: `expires` is not in the future.
            Conflict: the key ends earlier than that.
            Unauthenticated: `by` has lost its authority.
            NotFound: this owner has no such key, or there is no such owner.
        """
        return await write_catalog(self._keyring.shorten, tenant, key_id, expires, by)

    async def revoke_key(self, tenant: str | None, key_id: str, by: Principal) -> None:
        """Revokes a key.

        Raises:
            Unauthenticated: `by` has lost its authority.
            NotFound: this owner has no such key, or there is no such owner.
        """
        await write_catalog(self._keyring.revoke, tenant, key_id, by)
