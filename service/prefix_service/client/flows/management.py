"""Methods of both clients that manage adapters, tenants and keys, as flows; they need nothing of their client.

Each can raise what the service reported (NotFound, Forbidden, …), and ConnectionFailed. A call is tried again where
that is safe: then a deletion that finds nothing is done, and a change under a condition, of which the answer was lost,
is reported as ConnectionFailed, since its first try may have made the condition false.
"""

import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final

from prefix_service.client.flows import listing
from prefix_service.client.flows.flows import Flow, adapter_alone
from prefix_service.client.flows.listing import Item, pages
from prefix_service.client.protocol import Answer, Buffer, Request, adapter_path, tenant_path
from prefix_service.errors import InvalidRequest, InvalidResponse, NotFound
from prefix_service.prefix.references import check_alias, parse_qualified

Found = Mapping[str, Any]

_KEY_ID: Final = re.compile(r"[0-9a-f]{16}")


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


def whoami() -> Flow[Found]:
    """The key of this client: its `id`, `name`, `tenant` (None: the platform), `scope`, and when it `expires`."""
    answer: Answer = yield Request("GET", "/v1/whoami")
    return answer.json_object()


def keys(tenant: str | None = None) -> Flow[list[Item]]:
    """Every key of a tenant, or of the platform, oldest first, without their secrets."""
    return (yield from pages(_keys_path(tenant)))


def key(key_id: str, tenant: str | None = None) -> Flow[Found]:
    """A key of a tenant, or of the platform, without its secret."""
    answer: Answer = yield Request("GET", _key_path(key_id, tenant))
    return answer.json_object()


def create_key(
    scope: str, tenant: str | None = None, *, name: str = "", expires: datetime | None = None
) -> Flow[Found]:
    """Make a key of a tenant, or of the platform: what it is, and its text, `key`, which no other answer has. A naive
    `expires` is in UTC. It is never sent twice.

    Raises:
        ConnectionFailed: it may have been made: look at `keys`.
    """
    wanted = {"scope": scope, "name": name, "expires": None if expires is None else expires.isoformat()}
    answer: Answer = yield Request("POST", _keys_path(tenant), json=wanted)
    return answer.json_object()


def shorten_key(key_id: str, expires: datetime, tenant: str | None = None) -> Flow[Found]:
    """Give a key of a tenant, or of the platform, an end, or an earlier one than it has: what it is then. A naive
    `expires` is in UTC.

    Raises:
        Conflict: it ends earlier than that.
    """
    answer: Answer = yield Request("PUT", _key_path(key_id, tenant), json={"expires": expires.isoformat()})
    return answer.json_object()


def revoke_key(key_id: str, tenant: str | None = None) -> Flow[None]:
    """Revoke a key of a tenant, or of the platform."""
    yield from _deletion(_key_path(key_id, tenant))


def _keys_path(tenant: str | None) -> str:
    return "/v1/keys" if tenant is None else tenant_path(tenant, "keys")


def _key_path(key_id: str, tenant: str | None) -> str:
    if not _KEY_ID.fullmatch(key_id):
        raise InvalidRequest(f"a key's id has 16 characters of 0-9 and a-f, got {key_id!r:.40}")
    return f"{_keys_path(tenant)}/{key_id}"


def card(reference: str) -> Flow[str]:
    """The model card of a version, in Markdown; empty where there is none."""
    answer: Answer = yield Request("GET", adapter_path(*parse_qualified(reference), "card"))
    try:
        return bytes(answer.body).decode()
    except UnicodeDecodeError as error:
        raise InvalidResponse(f"a card should be UTF-8, got {bytes(answer.body[:80])!r}") from error


def put_card(reference: str, text: str) -> Flow[None]:
    """Replace the model card of a version."""
    path = adapter_path(*parse_qualified(reference), "card")
    yield Request("PUT", path, headers={"Content-Type": "text/markdown"}, content=text.encode())


def annotations(reference: str) -> Flow[dict[str, str]]:
    """The annotations of a version: texts by key."""
    answer: Answer = yield Request("GET", adapter_path(*parse_qualified(reference), "annotations"))
    found = answer.json_object()
    if not all(isinstance(value, str) for value in found.values()):
        raise InvalidResponse(f"annotations should be texts, got {found!r:.200}")
    return found


def put_annotations(reference: str, annotations: Mapping[str, str]) -> Flow[None]:
    """Replace all annotations of a version."""
    yield Request("PUT", adapter_path(*parse_qualified(reference), "annotations"), json=dict(annotations))


def usage(
    tenant: str | None = None,
    *,
    by: str = "",
    since: datetime | None = None,
    until: datetime | None = None,
    limit: int | None = None,
) -> Flow[list[Item]]:
    """What was used by hour, oldest first: of a tenant's adapters, or of all.

    `by` names what is counted apart, with commas between: `adapter`, `version`, `key`. `since` and `until` bound the
    hours; a moment without an offset is in UTC.
    """
    path = "/v1/usage" if tenant is None else tenant_path(tenant, "usage")
    moments = {"since": since, "until": until}
    params = {"by": by} | {name: moment.isoformat() for name, moment in moments.items() if moment is not None}
    return (yield from pages(path, params, limit))


def _deletion(path: str) -> Flow[None]:
    answer: Answer = yield Request("DELETE", path)
    if answer.status != 204:
        raise InvalidResponse(f"a deletion should be answered with status 204, got {answer.status}")


def parameters(reference: str, first: int, stop: int) -> Flow[Buffer]:
    """The bytes `first` … `stop` - 1 of the weights file of a version, as it was uploaded; at most 32 MiB.

    Raises:
        InvalidResponse: other bytes came.
    """
    path = adapter_path(*parse_qualified(reference), "parameters")
    answer: Answer = yield Request("GET", path, headers={"Range": f"bytes={first}-{stop - 1}"})
    if answer.status != 206 or len(answer.body) != stop - first:
        raise InvalidResponse(
            f"bytes {first} to {stop} of {reference}'s weights were asked for, and {len(answer.body)} bytes came with "
            f"status {answer.status}"
        )
    return answer.body


def rollback(adapter: str, alias: str) -> Flow[tuple[int, int]]:
    """Point an alias at the version that it named before. Returns that version's number, and the one that it named
    until now. A second call undoes the first.

    Raises:
        NotFound: the alias named no other version before, or that version is gone.
        PreconditionFailed: somebody moved the alias meanwhile.
    """
    answer: Answer = yield Request("GET", _alias_path(adapter, alias))
    found = answer.json_object()
    current = _number(found.get("version"))
    if found.get("previous") is None:
        raise NotFound(
            f"the service knows of no version that {adapter}@{alias} named before {current}: point it at a version by "
            "its number"
        )
    before = _number(found["previous"])
    yield from put_alias(adapter, alias, before, if_match=current)
    return before, current


def _number(value: Any) -> int:
    """Returns the number of a version.

    Raises:
        InvalidResponse: it is none.
    """
    if type(value) is not int or value < 1:
        raise InvalidResponse(f"the number of a version was expected, got {value!r:.100}")
    return value
