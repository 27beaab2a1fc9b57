"""Flows of who manages adapters and tenants; a client carries them out:

client.run(management.put_alias("acme/summarize", "prod", 3))
await async_client.run(management.delete("acme/summarize@2"))

Each may raise what the service says (NotFound, Forbidden, …), and ConnectionFailed. A call is tried again where that
is safe: then a deletion that finds nothing is done, and a change under a condition, of which the answer was lost, is
reported as ConnectionFailed, since its first try may have made the condition false.
"""

from collections.abc import Mapping
from typing import Any

from prefix_service.client.flows import listing
from prefix_service.client.flows.flows import Flow, adapter_alone
from prefix_service.client.flows.listing import Item, pages
from prefix_service.client.protocol import Answer, Request, adapter_path, tenant_path
from prefix_service.errors import InvalidRequest, InvalidResponse
from prefix_service.prefix.references import check_alias, parse_qualified

Found = Mapping[str, Any]


def aliases(adapter: str) -> Flow[dict[str, int]]:
    """The aliases of `tenant/name`, in the order of their names, and the version numbers that they point at."""
    tenant, name = adapter_alone(adapter)
    found: dict[str, int] = {}
    for item in (yield from listing.versions(tenant, name)):
        version, names = item.get("version"), item.get("aliases")
        if type(version) is not int or not isinstance(names, list) or not all(isinstance(one, str) for one in names):
            raise InvalidResponse(f"a version should have its number and its aliases, got {item!r:.200}")
        found |= dict.fromkeys(names, version)
    return dict(sorted(found.items()))


def put_alias(
    adapter: str,
    alias: str,
    version: int,
    *,
    preload: bool = False,
    if_match: int | None = None,
    create_only: bool = False,
) -> Flow[bool]:
    """Point an alias at a version, and whether it is new.

    `preload` moves it once the version is in memory; `if_match` only if it points at that version, `create_only` only
    if there is no such alias.

    Raises:
        PreconditionFailed: it points elsewhere.
    """
    if create_only and if_match is not None:
        raise InvalidRequest("an alias that is to be new points nowhere yet: ask for one condition, not both")
    headers = {"If-None-Match": "*"} if create_only else {}
    if if_match is not None:
        headers["If-Match"] = f'"{if_match}"'
    path = _alias_path(adapter, alias)
    change = Request("PUT", path, headers=headers, json={"version": version, "preload": preload})
    answer: Answer = yield change
    answer.json_object()
    return answer.status == 201


def delete_alias(adapter: str, alias: str) -> Flow[None]:
    """Forget an alias; its version stays."""
    yield from _deletion(_alias_path(adapter, alias))


def _alias_path(adapter: str, alias: str) -> str:
    tenant, name = adapter_alone(adapter)
    return adapter_path(tenant, name, "aliases", check_alias(alias))


def delete(reference: str) -> Flow[None]:
    """Delete `tenant/name`, or the version `…@7` or `…@sha256:…`.

    Raises:
        Conflict: an alias points at the version.
    """
    yield from _deletion(adapter_path(*parse_qualified(reference)))


def load(reference: str, *, pinned: bool = False) -> Flow[Found]:
    """Bring a version into memory, and wait: its state there. `pinned` keeps it."""
    path = adapter_path(*parse_qualified(reference), "residency")
    answer: Answer = yield Request("PUT", path, json={"pinned": pinned})
    return answer.json_object()


def unload(reference: str) -> Flow[None]:
    """Take a version out of memory; the next request loads it again."""
    yield from _deletion(adapter_path(*parse_qualified(reference), "residency"))


def versions(adapter: str) -> Flow[list[Item]]:
    """Every version of `tenant/name`, newest first."""
    return (yield from listing.versions(*adapter_alone(adapter)))


def residency(limit: int = 100) -> Flow[Found]:
    """What the process that answers has in memory: `tiers`, `tenants`, and the `limit` largest versions, `resident`."""
    return (yield from listing.residency(limit))


def tenants() -> Flow[list[Item]]:
    """Every tenant, in the order of their names."""
    return (yield from pages("/v1/tenants"))


def tenant(name: str) -> Flow[Found]:
    """A tenant, its quotas, and what it has."""
    answer: Answer = yield Request("GET", tenant_path(name))
    return answer.json_object()


def put_tenant(name: str, quotas: Mapping[str, int | None] | None = None) -> Flow[tuple[Found, bool]]:
    """Make a tenant, or give one other quotas: what it is then, and whether it is new.

    `quotas` sets `max_adapters`, `max_bytes` and `requests_per_second` at once; what it leaves out, or has as None, is
    without limit. Without `quotas` they stay as they are.
    """
    answer: Answer = yield Request("PUT", tenant_path(name), json=quotas)
    return answer.json_object(), answer.status == 201


def delete_tenant(name: str) -> Flow[None]:
    """Delete a tenant with its keys, adapters and versions."""
    yield from _deletion(tenant_path(name))


def audit(tenant: str | None = None, limit: int = 100) -> Flow[list[Item]]:
    """The `limit` latest changes, newest first: of a tenant's resources, or of all."""
    path = "/v1/audit" if tenant is None else tenant_path(tenant, "audit")
    return (yield from pages(path, limit=limit))


def _deletion(path: str) -> Flow[None]:
    answer: Answer = yield Request("DELETE", path)
    if answer.status != 204:
        raise InvalidResponse(f"a deletion should be answered with status 204, got {answer.status}")


def whoami() -> Flow[Found]:
    """Returns the key that asks: its `id`, `name`, `tenant` (None for a key of the platform), `scope` and `expires`."""
    answer: Answer = yield Request("GET", "/v1/whoami")
    return answer.json_object()
