"""`usage`: which adapters and versions are used, by which keys, hour by hour."""

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from prefix_service.cli.console import human_time, print_json, print_table
from prefix_service.cli.moments import parse_past
from prefix_service.cli.options import DEFAULT_URL, ApiKey, Json, Url, connect, own_tenant
from prefix_service.system.sizes import human_bytes


def register(app: typer.Typer) -> None:
    """Add this command to the command line."""
    app.command()(usage)


def usage(
    tenant: Annotated[
        str | None, typer.Argument(metavar="TENANT", help="The tenant; else that of the key, or all (platform admin).")
    ] = None,
    by: Annotated[
        str, typer.Option("--by", metavar="adapter,version,key", help="What is counted apart; '' for the sums alone.")
    ] = "adapter",
    since: Annotated[
        str,
        typer.Option(metavar="MOMENT", help="From the hour of 2027-01-31 or 2027-01-31T12:00:00Z on, or of 7d ago."),
    ] = "1d",
    until: Annotated[str | None, typer.Option(metavar="MOMENT", help="Hours that begin before this moment.")] = None,
    limit: Annotated[int, typer.Option(min=1, metavar="N", help="At most so many lines.")] = 1000,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    as_json: Json = False,
) -> None:
    """Show what is used, by which key, hour by hour.

    That is requests, bytes sent, loads of versions that were not in memory (cold), and prefix tokens handed out. The
    oldest hour is first; counts appear within a minute.
    """
    first, last = parse_past(since), None if until is None else parse_past(until)
    with connect(url, api_key) as client:
        tenant = own_tenant(client, tenant)
        items = client.usage(tenant, by=by, since=first, until=last, limit=limit)
    if as_json:
        print_json({"items": items})
        return
    kinds = ("tenant", "adapter", "version", "key") if tenant is None else ("adapter", "version", "key")
    named = [name for name in kinds if any(item[name] for item in items)]
    columns = ["hour (UTC)", *named, "requests", "sent", "cold loads", "prefix tokens"]
    print_table(f"Usage of {tenant or 'all tenants'}", columns, [_line(item, named) for item in items])


def _line(item: Mapping[str, Any], named: list[str]) -> list[object]:
    counts = [item["requests"], human_bytes(item["bytes"]), item["cold_loads"], item["prefix_tokens"]]
    return [human_time(item["hour"]), *(item[name] for name in named), *counts]
