"""`tenant` and `audit`: who is hosted, how much they may have, and what was done."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from prefix_service.cli.console import human_time, print_fields, print_json, print_table, report, used_of
from prefix_service.cli.options import DEFAULT_URL, ApiKey, Json, Url, Yes, confirm, connect, own_tenant
from prefix_service.errors import InvalidInput, NotFound
from prefix_service.system.sizes import human_bytes, parse_bytes

if TYPE_CHECKING:
    from prefix_service.client import PrefixClient

tenant_app = typer.Typer(help="Tenants and their quotas; for the platform's admin.")

_COLUMNS: Final = ["tenant", "created (UTC)", "adapters", "bytes", "requests/s"]

Name = Annotated[str, typer.Argument(metavar="TENANT", help="The tenant.")]


def register(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    app.add_typer(tenant_app, name="tenant", no_args_is_help=True)
    app.command()(audit)


@tenant_app.command("list")
def list_tenants(url: Url = DEFAULT_URL, api_key: ApiKey = None, as_json: Json = False) -> None:
    """List every tenant: what it has, and what it may have."""
    with connect(url, api_key) as client:
        found = client.tenants()
    if as_json:
        print_json({"items": found})
        return
    print_table("Tenants", _COLUMNS, [_shown(item) for item in found])


@tenant_app.command("show")
def show_tenant(name: Name, url: Url = DEFAULT_URL, api_key: ApiKey = None, as_json: Json = False) -> None:
    """Show a tenant: what it has, and what it may have."""
    with connect(url, api_key) as client:
        _print(client.tenant(name), as_json=as_json)


@tenant_app.command("set")
def set_tenant(
    name: Name,
    max_adapters: Annotated[str | None, typer.Option(help="A number, or none to lift it.", metavar="N")] = None,
    max_bytes: Annotated[
        str | None,
        typer.Option(help="Bytes of all versions, as in 10GiB, 500MB or 4096, or none to lift it.", metavar="SIZE"),
    ] = None,
    requests_per_second: Annotated[str | None, typer.Option(help="A number, or none to lift it.", metavar="N")] = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    as_json: Json = False,
) -> None:
    """Make a tenant, or change its quotas.

    Quotas that are not given stay as they are. The service takes all quotas at once: of two changes at the same moment
    the later one wins whole.
    """
    given = {"max_adapters": max_adapters, "max_bytes": max_bytes, "requests_per_second": requests_per_second}
    changes = {quota: _parsed(quota, text) for quota, text in given.items() if text is not None}
    with connect(url, api_key) as client:
        quotas = {**_quotas(client, name), **changes} if changes else None
        item, _ = client.put_tenant(name, quotas)
    _print(item, as_json=as_json)


@tenant_app.command("rm")
def remove_tenant(
    name: Name, yes: Yes = False, url: Url = DEFAULT_URL, api_key: ApiKey = None, as_json: Json = False
) -> None:
    """Delete a tenant with its keys, adapters and versions."""
    if not yes:
        with connect(url, api_key) as client:
            has = client.tenant(name)
        what = f"its keys, {has['adapters']} adapters and {human_bytes(has['bytes'])}"
        confirm(f"delete tenant {name} with {what}", yes=yes)
    with connect(url, api_key) as client:
        client.delete_tenant(name)
    report(f"deleted tenant {name}", {"deleted": name}, as_json=as_json)


def audit(
    tenant: Annotated[
        str | None, typer.Argument(metavar="TENANT", help="Only changes of this tenant's resources; else of the key's.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, metavar="N", help="At most so many.")] = 50,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    as_json: Json = False,
) -> None:
    """Show who changed what, newest first. With a key of the platform's admin and without a tenant, of all."""
    with connect(url, api_key) as client:
        tenant = own_tenant(client, tenant)
        found = client.audit(tenant, limit)
    if as_json:
        print_json({"items": found})
        return
    columns = ["time (UTC)", "who, with which key", "what"]
    print_table(f"Changes of {tenant or 'the platform'}", columns, [_change(entry) for entry in found])


def _change(entry: Mapping[str, Any]) -> list[object]:
    # A digest would break every line, and the version's number names the same.
    given = {name: "none" if value is None else value for name, value in entry["details"].items() if name != "digest"}
    details = " ".join(f"{name}={value}" for name, value in given.items())
    who = " ".join(dict.fromkeys(filter(None, (entry["actor"], entry["key_name"], entry["key_id"]))))
    return [human_time(entry["at"]), who, f"{entry['action']} {entry['target']} {details}".rstrip()]


def _shown(item: Mapping[str, Any]) -> list[object]:
    adapters = used_of(item["adapters"], item["max_adapters"])
    nbytes = used_of(item["bytes"], item["max_bytes"], human_bytes)
    rate = item["requests_per_second"] or "no limit"
    return [item["tenant"], human_time(item["created"]), adapters, nbytes, rate]


def _print(item: Mapping[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(item)
        return
    fields = dict(zip(_COLUMNS, _shown(item), strict=True))
    print_fields(item["tenant"], {**fields, "uncollected": human_bytes(item["uncollected"])})


def _count(text: str) -> int:
    if not text.isdecimal():
        raise InvalidInput(f"{text!r} is not a number")
    return int(text)


_PARSERS: Final[dict[str, Callable[[str], int]]] = {
    "max_adapters": _count,
    "max_bytes": parse_bytes,
    "requests_per_second": _count,
}


def _parsed(quota: str, text: str) -> int | None:
    return None if text == "none" else _PARSERS[quota](text)


def _quotas(client: "PrefixClient", name: str) -> dict[str, int | None]:
    """Returns the present quotas of a tenant; none if it does not exist yet."""
    try:
        item = client.tenant(name)
    except NotFound:
        return {}
    return {quota: item[quota] for quota in _PARSERS}
