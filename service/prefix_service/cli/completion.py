"""Completion of names in a shell: it asks the service, for a second or two, and is silent where that fails."""

from typing import TYPE_CHECKING, Final

import typer

from prefix_service.errors import PrefixServiceError

if TYPE_CHECKING:
    from prefix_service.client import PrefixClient

_SECONDS: Final = 1.0
_OFFERED: Final = 100  # names; nobody reads more
_SEARCHED: Final = 1000  # names that hold the word: the service cannot be asked for those that begin with it


def complete_adapter(context: typer.Context, incomplete: str) -> list[str]:
    """Returns the adapters, as `tenant/adapter`, that a word may become: those of the key's own tenant, or for a key of
    the platform of the one tenant that is meant. Where several tenants are meant, it returns those."""
    from prefix_service.client import PrefixClient

    given = context.params
    uds, ca_file = given.get("uds"), given.get("ca_file")
    try:
        with PrefixClient(given["url"], given.get("api_key"), timeout=_SECONDS, uds=uds, ca_file=ca_file) as client:
            return _completed(client, incomplete)
    except PrefixServiceError:
        return []


def _completed(client: "PrefixClient", incomplete: str) -> list[str]:
    tenant, slash, part = incomplete.partition("/")
    if not slash:
        tenants = [name for name in _tenants(client) if name.startswith(tenant)]
        if len(tenants) != 1:
            return [f"{name}/" for name in tenants[:_OFFERED]]
        (tenant,) = tenants
    found = client.list(tenant, search=part, limit=_SEARCHED)
    names = [str(item.get("adapter")) for item in found]
    return [f"{tenant}/{name}" for name in names if name.startswith(part)][:_OFFERED]


def _tenants(client: "PrefixClient") -> list[str]:
    """Returns the tenants that the key may see. Only one of the platform's admin lists them."""
    own = client.whoami().get("tenant")
    return [str(item.get("tenant")) for item in client.tenants()] if own is None else [str(own)]
