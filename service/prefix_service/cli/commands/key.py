"""`key` and `whoami`: keys of a service, or in the data folder of one that is stopped."""

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, TypeAlias

import typer

from prefix_service.cli.commands.serve import load_settings
from prefix_service.cli.console import human_time, note, print_json, print_table, report
from prefix_service.cli.moments import parse_duration, parse_end
from prefix_service.cli.options import DEFAULT_URL, ApiKey, Json, Url, connect, unfolded
from prefix_service.errors import InvalidRequest, NotFound, PrefixServiceError
from prefix_service.prefix.references import check_name
from prefix_service.system.printable import printable

if TYPE_CHECKING:
    from prefix_service.catalog.keys import Keyring
    from prefix_service.catalog.records import Key
    from prefix_service.catalog.tenants import Tenants
    from prefix_service.client import PrefixClient

key_app = typer.Typer(help="Make, list, rotate and revoke keys. --data-dir works on the catalog without a service.")

Scope: TypeAlias = Literal["metrics", "read", "write", "admin"]
KeyId = Annotated[str, typer.Argument(metavar="ID", help="The id that `key list` shows.")]
Expires = Annotated[
    str | None,
    typer.Option(metavar="MOMENT", help="When it ends: 2027-01-31, 2027-01-31T12:00:00Z, or 90d from now. In UTC."),
]


def register(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    app.add_typer(key_app, name="key", no_args_is_help=True)
    app.command()(whoami)


class _Keys(Protocol):
    """Keys as the API shows them; the owner is a tenant, or None for the platform."""

    def own(self) -> str | None:
        """Returns the owner that a command is about if none is named."""

    def create(self, owner: str | None, scope: Scope, name: str, expires: datetime | None) -> dict[str, Any]:
        """Make a key: what it is, with its text. A tenant that does not exist is made."""

    def listed(self, owner: str | None) -> list[dict[str, Any]]:
        """Returns every key, oldest first."""

    def get(self, owner: str | None, key_id: str) -> dict[str, Any]:
        """Returns a key."""

    def shorten(self, owner: str | None, key_id: str, expires: datetime) -> dict[str, Any]:
        """Give a key an end, or an earlier one: what it is then."""

    def revoke(self, owner: str | None, key_id: str) -> None:
        """Revoke a key."""


class _OfService:
    def __init__(self, client: "PrefixClient") -> None:
        self._client = client

    def own(self) -> str | None:
        tenant: str | None = self._client.whoami()["tenant"]
        return tenant

    def create(self, owner: str | None, scope: Scope, name: str, expires: datetime | None) -> dict[str, Any]:
        def create() -> dict[str, Any]:
            return dict(self._client.create_key(scope, owner, name=name, expires=expires))

        try:
            return create()
        except NotFound:
            if owner is None:
                raise
        _, is_new = self._client.put_tenant(owner)
        _mention(owner, is_new=is_new)
        return create()

    def listed(self, owner: str | None) -> list[dict[str, Any]]:
        return self._client.keys(owner)

    def get(self, owner: str | None, key_id: str) -> dict[str, Any]:
        return dict(self._client.key(key_id, owner))

    def shorten(self, owner: str | None, key_id: str, expires: datetime) -> dict[str, Any]:
        return dict(self._client.shorten_key(key_id, expires, owner))

    def revoke(self, owner: str | None, key_id: str) -> None:
        self._client.revoke_key(key_id, owner)


class _OfFolder:
    def __init__(self, keyring: "Keyring", tenants: "Tenants") -> None:
        from prefix_service.catalog.records import COMMAND_LINE

        self._keyring, self._tenants, self._by = keyring, tenants, COMMAND_LINE

    def own(self) -> str | None:
        return None

    def create(self, owner: str | None, scope: Scope, name: str, expires: datetime | None) -> dict[str, Any]:
        if owner is not None:
            _mention(owner, is_new=self._tenants.put(owner, self._by))
        key, text = self._keyring.create(owner, scope, name, self._by, expires)
        return {**_shown(key), "key": text}

    def listed(self, owner: str | None) -> list[dict[str, Any]]:
        return [_shown(key) for key in self._keyring.listed(owner)]

    def get(self, owner: str | None, key_id: str) -> dict[str, Any]:
        return _shown(self._keyring.get(owner, key_id))

    def shorten(self, owner: str | None, key_id: str, expires: datetime) -> dict[str, Any]:
        return _shown(self._keyring.shorten(owner, key_id, expires, self._by))

    def revoke(self, owner: str | None, key_id: str) -> None:
        self._keyring.revoke(owner, key_id, self._by)


def _mention(tenant: str, *, is_new: bool) -> None:
    if is_new:
        note(f"made tenant {tenant}")


def _shown(key: "Key") -> dict[str, Any]:
    """Returns a key of the catalog as the API shows it."""
    return {
        name: f"{value.isoformat()}Z" if isinstance(value, datetime) else value for name, value in asdict(key).items()
    }


@dataclass(frozen=True, slots=True)
class _Asked:
    """Whose keys a command is about, and where they are kept."""

    tenant: Annotated[str | None, typer.Option("--tenant", help="The tenant that the key belongs to.")] = None
    platform: Annotated[bool, typer.Option("--platform", help="A key of the platform, for all tenants.")] = False
    data_dir: Annotated[
        Path | None,
        typer.Option("--data-dir", help="Work without a service: on this folder, or the catalog that is set for it."),
    ] = None
    url: Url = DEFAULT_URL
    api_key: ApiKey = None

    @contextlib.contextmanager
    def keys(self) -> Iterator[_Keys]:
        """The keys of the service, or of a data folder if there is one given."""
        if self.data_dir is None:
            with connect(self.url, self.api_key) as client:
                yield _OfService(client)
            return
        from prefix_service.data_folder.opening import keys_of

        with keys_of(load_settings({"data_dir": self.data_dir})) as (keyring, tenants):
            yield _OfFolder(keyring, tenants)

    def named(self) -> str | None:
        """Returns the tenant whose key was named, None for the platform.

        Raises:
            InvalidRequest: both were named.
            InvalidReference: the tenant's name is malformed.
        """
        if self.platform and self.tenant is not None:
            raise InvalidRequest("a key belongs to the platform or to a tenant: give --platform or --tenant, not both")
        return None if self.tenant is None else check_name("tenant", self.tenant)

    def owner(self, keys: _Keys) -> str | None:
        """Returns the owner that was named, or that of the key that asks."""
        named = self.named()
        return keys.own() if named is None and not self.platform else named


@key_app.command("create")
@unfolded
def create_key(
    scope: Annotated[Scope, typer.Option(help="What the key may do; metrics: only read them, for the platform.")],
    asked: _Asked,
    name: Annotated[str, typer.Option(help="A note, shown in listings.")] = "",
    expires: Expires = None,
    as_json: Json = False,
) -> None:
    """Make a key and print it once. A tenant that does not exist yet is made."""
    owner = asked.named()
    if owner is None and not asked.platform:
        raise InvalidRequest("say whose key it is: --platform, or --tenant and a name")
    end = None if expires is None else parse_end(expires)
    with asked.keys() as keys:
        made = keys.create(owner, scope, name, end)
    _print_made(made, as_json=as_json)


@key_app.command("list")
@unfolded
def list_keys(
    asked: _Asked,
    as_json: Json = False,
) -> None:
    """List keys without their secrets. Without --tenant or --platform, those of the owner of the key in use."""
    with asked.keys() as keys:
        owner = asked.owner(keys)
        found = keys.listed(owner)
    if as_json:
        print_json({"items": found})
        return
    columns = ["id", "scope", "name", "created", "expires", "last used"]
    print_table(f"Keys of {_whose(owner)}, times in UTC", columns, [_row(key) for key in found])


@key_app.command("rotate")
@unfolded
def rotate_key(
    key_id: KeyId,
    asked: _Asked,
    overlap: Annotated[str, typer.Option(metavar="DURATION", help="How long both keys work: 7d, 12h or 30m.")] = "7d",
    expires: Expires = None,
    as_json: Json = False,
) -> None:
    """Make a second key like the first, and give the first an end.

    The second is printed once. It has the same scope and name. It has no end if the first had none; else it lives as
    long as the first was meant to, or until --expires.
    """
    both = parse_duration(overlap)
    end = None if expires is None else parse_end(expires)
    with asked.keys() as keys:
        first, second = rotate(keys, asked.owner(keys), key_id, both, end)
    if not as_json:
        note(f"the first key, {first['id']}, ends {human_time(first['expires'])} UTC")
        note(f"the second key, {second['id']}, ends {_end(second)}; keep it, it is shown once:")
    _print_made(second | ({"first": first} if as_json else {}), as_json=as_json)


@key_app.command("revoke")
@unfolded
def revoke_key(key_id: KeyId, asked: _Asked, as_json: Json = False) -> None:
    """Revoke a key: running services refuse it within seconds."""
    with asked.keys() as keys:
        keys.revoke(asked.owner(keys), key_id)
    report(f"revoked key {key_id}", {"revoked": key_id}, as_json=as_json)


def whoami(url: Url = DEFAULT_URL, api_key: ApiKey = None, as_json: Json = False) -> None:
    """Show the key in use: whose it is, its scope, and its end."""
    with connect(url, api_key) as client:
        found = client.whoami()
    if as_json:
        print_json(found)
        return
    shown = {
        "id": found["id"],
        "name": found["name"],
        "owner": _whose(found["tenant"]),
        "scope": found["scope"],
        "ends": _end(found),
    }
    print_table("Your key", ["what", "value"], [[name, value] for name, value in shown.items()])


def rotate(
    keys: _Keys, owner: str | None, key_id: str, overlap: timedelta, expires: datetime | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Make a second key like the first, and give that an end: returns both. If it fails, all is as it was."""
    first = keys.get(owner, key_id)
    if expires is None and first["expires"] is not None:
        lifetime = _moment(first["expires"]) - _moment(first["created"])
        expires = (datetime.now(UTC) + lifetime).replace(microsecond=0)
    name = printable(first["name"])  # older releases let control characters into names
    second = keys.create(owner, first["scope"], name, expires)
    # By the clock of the service, which decides when a key has ended.
    end = _moment(second["created"]) + overlap
    if first["expires"] is not None and _moment(first["expires"]) <= end:
        return first, second
    try:
        return keys.shorten(owner, key_id, end), second
    except PrefixServiceError:
        note(f"the first key is as it was, so the second, {second['id']}, is revoked again")
        keys.revoke(owner, second["id"])
        raise


def _print_made(key: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(key)
    else:
        sys.stdout.write(f"{key['key']}\n")


def _whose(owner: str | None) -> str:
    return "the platform" if owner is None else f"tenant {owner}"


def _end(key: Any) -> str:
    return "never" if key["expires"] is None else f"{human_time(key['expires'])} UTC"


def _row(key: dict[str, Any]) -> list[object]:
    moments = [key[name] and human_time(key[name]) for name in ("created", "expires", "last_used")]
    return [key["id"], key["scope"], key["name"], *moments]


def _moment(text: str) -> datetime:
    return datetime.fromisoformat(text)
