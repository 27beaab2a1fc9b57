"""The methods of both clients that manage adapters, tenants and keys, as flows that need nothing of their client.

Each can raise errors that the service reported (NotFound, Forbidden, …), and ConnectionFailed. A call is retried if
that is safe: a repeated deletion that finds nothing counts as done, and a conditional change whose answer was lost is
reported as ConnectionFailed, since the first attempt may have made the condition false.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Final

from prefix_service.client.flows import listing
from prefix_service.client.flows.flows import adapter_alone
from prefix_service.client.flows.listing import Item, pages
from prefix_service.client.protocol import Answer, Buffer, Flow, Request, adapter_path, tenant_path
from prefix_service.errors import InvalidRequest, InvalidResponse, NotFound
from prefix_service.prefix.references import check_alias, parse_qualified

Found = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ServiceInfo:
    """The release of a service, and the time of its clock in whole seconds when it answered; None if it sent none."""

    version: str
    time: datetime | None


_KEY_ID: Final = re.compile(r"[0-9a-f]{16}")


def aliases(adapter: str) -> Flow[dict[str, int]]:
    """Returns the aliases of `tenant/name` in the order of their names, with the version numbers that they point to."""
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
    """Points an alias to a version; returns whether the alias is new.

    With `preload`, the alias moves once the version is in memory. With `if_match`, it moves only if it points to that
    version; with `create_only`, only if it does not exist.

    Raises:
        PreconditionFailed: the alias points to another version.
        InvalidRequest: both conditions were given.
    """
    if create_only and if_match is not None:
        raise InvalidRequest("create_only and if_match exclude each other: pass one of them")
    headers = {"If-None-Match": "*"} if create_only else {}
    if if_match is not None:
        headers["If-Match"] = f'"{if_match}"'
    path = _alias_path(adapter, alias)
    change = Request("PUT", path, headers=headers, json={"version": version, "preload": preload})
    answer: Answer = yield change
    answer.json_object()
    return answer.status == 201


def delete_alias(adapter: str, alias: str) -> Flow[None]:
    """Deletes an alias; its version stays."""
    yield from _deletion(_alias_path(adapter, alias))


def _alias_path(adapter: str, alias: str) -> str:
    tenant, name = adapter_alone(adapter)
    return adapter_path(tenant, name, "aliases", check_alias(alias))


def delete(reference: str) -> Flow[None]:
    """Deletes `tenant/name`, or the version `…@7` or `…@sha256:…`.

    Raises:
        Conflict: an alias points to the version.
    """
    yield from _deletion(adapter_path(*parse_qualified(reference)))


def load(reference: str, *, pinned: bool = False) -> Flow[Found]:
    """Loads a version into memory, and waits for it; returns its state there. `pinned` keeps it in memory."""
    path = adapter_path(*parse_qualified(reference), "residency")
    answer: Answer = yield Request("PUT", path, json={"pinned": pinned})
    return answer.json_object()


def unload(reference: str) -> Flow[None]:
    """Evicts a version from memory; the next request loads it again."""
    yield from _deletion(adapter_path(*parse_qualified(reference), "residency"))


def versions(adapter: str) -> Flow[list[Item]]:
    """Returns every version of `tenant/name`, newest first."""
    return (yield from listing.versions(*adapter_alone(adapter)))


def residency(limit: int = 100) -> Flow[Found]:
    """Returns the state of the answering process's memory: `tiers`, `tenants`,
    and the `limit` largest versions as `resident`.
    """
    return (yield from listing.residency(limit))


def tenants() -> Flow[list[Item]]:
    """Returns every tenant, in the order of their names."""
    return (yield from pages("/v1/tenants"))


def tenant(name: str) -> Flow[Found]:
    """Returns a tenant, its quotas, and its usage of them."""
    answer: Answer = yield Request("GET", tenant_path(name))
    return answer.json_object()


def put_tenant(name: str, quotas: Mapping[str, int | None] | None = None) -> Flow[tuple[Found, bool]]:
    """Creates a tenant, or replaces the quotas of one; returns the tenant, and whether it is new.

    `quotas` sets `max_adapters`, `max_bytes` and `requests_per_second` together; one that is missing or None is
    unlimited. Without `quotas`, they are not changed.
    """
    answer: Answer = yield Request("PUT", tenant_path(name), json=quotas)
    return answer.json_object(), answer.status == 201


def delete_tenant(name: str) -> Flow[None]:
    """Deletes a tenant with its keys, adapters and versions."""
    yield from _deletion(tenant_path(name))


def audit(tenant: str | None = None, limit: int = 100) -> Flow[list[Item]]:
    """Returns the `limit` latest changes, newest first: of a tenant's resources, or of all."""
    path = "/v1/audit" if tenant is None else tenant_path(tenant, "audit")
    return (yield from pages(path, limit=limit))


def whoami() -> Flow[Found]:
    """Returns this client's key: its `id`, `name`, `tenant` (None: the platform), `scope`, and when it `expires`; and
    `max_upload_bytes`, the largest weights file that the service accepts.
    """
    answer: Answer = yield Request("GET", "/v1/whoami")
    return answer.json_object()


def keys(tenant: str | None = None) -> Flow[list[Item]]:
    """Returns every key of a tenant, or of the platform, oldest first, without their secrets."""
    return (yield from pages(_keys_path(tenant)))


def key(key_id: str, tenant: str | None = None) -> Flow[Found]:
    """Returns a key of a tenant, or of the platform, without its secret."""
    answer: Answer = yield Request("GET", _key_path(key_id, tenant))
    return answer.json_object()


def create_key(
    scope: str, tenant: str | None = None, *, name: str = "", expires: datetime | None = None
) -> Flow[Found]:
    """Creates a key of a tenant, or of the platform; returns it with its text, `key`, which no other answer contains.

    A naive `expires` is in UTC. The request is never repeated.

    Raises:
        ConnectionFailed: there was no answer; the key may exist: look at `keys`.
    """
    wanted = {"scope": scope, "name": name, "expires": None if expires is None else expires.isoformat()}
    answer: Answer = yield Request("POST", _keys_path(tenant), json=wanted)
    return answer.json_object()


def shorten_key(key_id: str, expires: datetime, tenant: str | None = None) -> Flow[Found]:
    """Sets the expiry of a key of a tenant, or of the platform, or makes it earlier; returns the key.

    A naive `expires` is in UTC.

    Raises:
        Conflict: the key expires earlier already.
    """
    answer: Answer = yield Request("PUT", _key_path(key_id, tenant), json={"expires": expires.isoformat()})
    return answer.json_object()


def revoke_key(key_id: str, tenant: str | None = None) -> Flow[None]:
    """Revokes a key of a tenant, or of the platform."""
    yield from _deletion(_key_path(key_id, tenant))


def _keys_path(tenant: str | None) -> str:
    return "/v1/keys" if tenant is None else tenant_path(tenant, "keys")


def _key_path(key_id: str, tenant: str | None) -> str:
    if not _KEY_ID.fullmatch(key_id):
        raise InvalidRequest(f"a key's id has 16 characters of 0-9 and a-f, got {key_id!r:.40}")
    return f"{_keys_path(tenant)}/{key_id}"


def card(reference: str) -> Flow[str]:
    """Returns the model card of a version, in Markdown; empty if it has none."""
    answer: Answer = yield Request("GET", adapter_path(*parse_qualified(reference), "card"))
    try:
        return bytes(answer.body).decode()
    except UnicodeDecodeError as error:
        raise InvalidResponse(f"a card should be UTF-8, got {bytes(answer.body[:80])!r}") from error


def put_card(reference: str, text: str) -> Flow[None]:
    """Replaces the model card of a version."""
    path = adapter_path(*parse_qualified(reference), "card")
    yield Request("PUT", path, headers={"Content-Type": "text/markdown"}, content=text.encode())


def annotations(reference: str) -> Flow[dict[str, str]]:
    """Returns the annotations of a version: texts by key."""
    answer: Answer = yield Request("GET", adapter_path(*parse_qualified(reference), "annotations"))
    found = answer.json_object()
    if not all(isinstance(value, str) for value in found.values()):
        raise InvalidResponse(f"annotations should be texts, got {found!r:.200}")
    return found


def put_annotations(reference: str, annotations: Mapping[str, str]) -> Flow[None]:
    """Replaces all annotations of a version."""
    yield Request("PUT", adapter_path(*parse_qualified(reference), "annotations"), json=dict(annotations))


def config_file(reference: str) -> Flow[bytes]:
    """The `adapter_config.json` of a version, byte for byte as it was uploaded; of one that was not uploaded, or to an
    older service, the config as PEFT writes it."""
    answer: Answer = yield Request("GET", adapter_path(*parse_qualified(reference), "config"))
    answer.json_object()
    return bytes(answer.body)


def service() -> Flow[ServiceInfo]:
    """Returns the release of the service, and the time of its clock. The request needs no key."""
    answer: Answer = yield Request("GET", "/openapi.json")
    info = answer.json_object().get("info")
    release = info.get("version") if isinstance(info, dict) else None
    if not isinstance(release, str):
        raise InvalidResponse(f"the service should send its version, got {release!r:.100}")
    try:
        moment = parsedate_to_datetime(answer.headers.get("date", "")).astimezone(UTC)
    except (ValueError, OverflowError):
        return ServiceInfo(release, None)
    return ServiceInfo(release, moment)


def usage(
    tenant: str | None = None,
    *,
    by: str = "",
    since: datetime | None = None,
    until: datetime | None = None,
    limit: int | None = None,
) -> Flow[list[Item]]:
    """Returns usage by hour, oldest first: of a tenant's adapters, or of all.

    `by` names what is counted separately, separated by commas: `adapter`, `version`, `key`. `since` and `until` bound
    the hours; a time without an offset is in UTC.
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
    """Returns the bytes `first` … `stop` - 1 of a version's weights file, as it was uploaded; at most 32 MiB.

    Raises:
        InvalidResponse: the answer has other bytes.
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
    """Returns a value that is a version number.

    Raises:
        InvalidResponse: it is not one.
    """
    if type(value) is not int or value < 1:
        raise InvalidResponse(f"the number of a version was expected, got {value!r:.100}")
    return value
