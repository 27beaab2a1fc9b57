"""Aliases and descriptions of versions, and the deletion of adapters, versions and aliases."""

import json
from collections.abc import Callable, Sequence
from typing import TypeVar

from prefix_service.catalog.catalog import Catalog
from prefix_service.catalog.descriptions import Descriptions
from prefix_service.catalog.listings import Listings
from prefix_service.catalog.records import Principal, Version
from prefix_service.catalog.threads import read_catalog, write_catalog
from prefix_service.errors import InvalidRequest
from prefix_service.prefix.description import Description
from prefix_service.prefix.fingerprint import Fingerprint, check_fingerprint, common_base_model
from prefix_service.prefix.references import Reference

T = TypeVar("T")


class Adapters:
    """Adapters, their versions and aliases, for callers that are already authorised. Any method may also raise
    OutOfSpace or StorageFailed, when the catalog refuses."""

    def __init__(self, catalog: Catalog, descriptions: Descriptions, listings: Listings) -> None:
        self._catalog, self._descriptions, self._listings = catalog, descriptions, listings

    async def numbers(self, tenant: str, adapter: str, limit: int) -> list[int]:
        """Returns the numbers of the `limit` newest versions of an adapter, ascending.

        Raises:
            NotFound: there is no such adapter.
        """
        return await read_catalog(self._listings.numbers, tenant, adapter, limit)

    async def aliases(self, tenant: str, adapter: str) -> dict[str, int]:
        """Returns the aliases of an adapter, and the numbers of the versions that they point at.

        Raises:
            NotFound: there is no such adapter.
        """
        return await read_catalog(self._catalog.aliases_of, tenant, adapter)

    async def alias(self, tenant: str, adapter: str, alias: str) -> tuple[int, int | None]:
        """Returns the number of the version that an alias points at, and of the one that it pointed at before, if any.

        Raises:
            NotFound: there is no such adapter or alias.
        """
        return await read_catalog(self._catalog.alias, tenant, adapter, alias)

    async def put_alias(
        self, tenant: str, adapter: str, alias: str, number: int, by: Principal, expected: int | None
    ) -> bool:
        """Points an alias at a version; returns whether the alias is new. `expected` is where it must point now: a
        number, None for nowhere, -1 for anywhere.

        Raises:
            Unauthenticated: `by` has lost its authority.
            NotFound: there is no such adapter or version.
            PreconditionFailed: it does not point where `expected` says.
            Conflict: the adapter has as many aliases as it may have.
        """
        return await write_catalog(self._catalog.put_alias, tenant, adapter, alias, number, by, expected)

    async def delete_alias(self, tenant: str, adapter: str, alias: str, by: Principal, expected: int | None) -> None:
        """Deletes an alias; `expected` is where it must point now: a number, None for nowhere, -1 for anywhere.

        Raises:
            Unauthenticated: `by` has lost its authority.
            NotFound: there is no such adapter or alias.
            PreconditionFailed: it does not point where `expected` says.
        """
        await write_catalog(self._catalog.delete_alias, tenant, adapter, alias, by, expected)

    async def description(self, version: Version) -> Description:
        """Returns the description of a version.

        Raises:
            NotFound: the version was deleted meanwhile.
        """
        return await read_catalog(self._descriptions.get, version)

    async def common_base_model(self, sources: Sequence[tuple[str, Version]]) -> str:
        """Returns the fingerprint of the one base model of versions, each with the name that the caller used, as a
        description has it: the settings that all of them know.

        Raises:
            InvalidRequest: two versions were made for different base models.
            NotFound: a version was deleted meanwhile.
        """

        def read() -> str:
            names: dict[str, str] = {}  # by fingerprint, so that equal ones are compared once
            for name, version in sources:
                names.setdefault(self._descriptions.get(version).fingerprint, name)
            named = [(name, Fingerprint.of(json.loads(text or "{}"))) for text, name in names.items()]
            return check_fingerprint(common_base_model(named).known())

        return await read_catalog(read)

    async def change_description(
        self,
        version: Version,
        by: Principal,
        what: str,
        change: Callable[[Description], Description],
        show: Callable[[Description], T],
    ) -> T:
        """Replaces the description of a version by what `change` makes of it in the transaction; returns what `show`
        makes of the new one. Both are called in a thread.

        `what` is changed, for the audit; what `change` raises is raised, and then nothing has changed.

        Raises:
            Unauthenticated: `by` has lost its authority.
            NotFound: the version was deleted meanwhile.
            QuotaExceeded: the tenant's quota of bytes does not allow it.
        """
        return await write_catalog(lambda: show(self._descriptions.change(version, by, what, change)))

    async def delete(self, tenant: str, reference: Reference, by: Principal) -> None:
        """Deletes an adapter, or the version that a number or digest names. Transfers in progress complete.

        Raises:
            InvalidRequest: the selector is an alias or `latest`.
            NotFound: there is no such adapter or version.
            Conflict: an alias points to the version.
            Unauthenticated: `by` has lost its authority.
        """
        if reference.explicit and not reference.immutable:
            raise InvalidRequest(f"delete by version number or digest, not by {reference.selector!r}")
        await write_catalog(self._catalog.delete, tenant, reference, by)
