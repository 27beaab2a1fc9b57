"""`list`, `versions` and `rm`: what is published."""

import contextlib
import heapq
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from prefix_service.cli.completion import complete_adapter
from prefix_service.cli.console import (
    human_time,
    print_json,
    print_table,
    report,
    working,
)
from prefix_service.cli.options import (
    DEFAULT_URL,
    AdapterName,
    ApiKey,
    Json,
    Url,
    Yes,
    confirm,
    connect,
    own_tenant,
)
from prefix_service.errors import InvalidRequest, NotFound
from prefix_service.system.sizes import human_bytes

if TYPE_CHECKING:
    from prefix_service.client import PrefixClient

Item = Mapping[str, Any]


_IN_PARALLEL: Final = 8
_LONGEST_NOTE: Final = 40  # characters of an annotation in a table


class Sort(StrEnum):
    """The order of a listing of adapters."""

    NAME = "name"
    CREATED = "-created"
    BYTES = "-bytes"
    USED = "-used"


def register(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    app.command(name="list")(list_adapters)
    app.command()(versions)
    app.command(name="rm")(remove)


def list_adapters(
    tenant: Annotated[str | None, typer.Argument(metavar="TENANT", help="The tenant; else that of the key.")] = None,
    every_tenant: Annotated[bool, typer.Option("--all", help="The adapters of all tenants.")] = False,
    search: Annotated[str | None, typer.Option(help="Only adapters whose names hold this.")] = None,
    base_model: Annotated[str | None, typer.Option(help="Only adapters of this base model.")] = None,
    sort: Annotated[
        Sort, typer.Option(help="By name, or the latest publication, the most bytes, or the most used first.")
    ] = Sort.NAME,
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="Only so many, the first.")] = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    as_json: Json = False,
) -> None:
    """List the adapters of a tenant, or with --all of all tenants. The size is that of all versions."""
    if every_tenant and tenant is not None:
        raise InvalidRequest("list the adapters of one tenant with `list TENANT`, or those of all with `list --all`")
    asked = {"search": search, "base_model": base_model, "sort": sort.value}
    with connect(url, api_key) as client, working("listing adapters"):
        if every_tenant:
            items = _of_all_tenants(client, asked, sort, limit)
        elif (tenant := own_tenant(client, tenant)) is None:
            raise InvalidRequest("a key of the platform has no tenant of its own: `list TENANT`, or `list --all`")
        else:
            items = _adapters(client, tenant, asked, limit)
    if as_json:
        print_json({"items": items})
        return
    columns = ["adapter", "latest", "tokens", "dtype", "size", "created (UTC)", "aliases", "base model"]
    title = "Adapters of all tenants" if tenant is None else f"Adapters of {tenant}"
    rows = [_listed(item, with_tenant=every_tenant) for item in items]
    if sort is Sort.USED:
        columns.insert(1, "requests")
        for row, item in zip(rows, items, strict=True):
            row.insert(1, item["used"])
    base_models = {row[-1] for row in rows}
    if len(base_models) == 1 and None not in base_models:  # a long name in every row leaves no room for the others
        title += f", all for {base_models.pop()}"
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    print_table(title, columns, rows)


def _adapters(client: "PrefixClient", tenant: str, asked: Mapping[str, str | None], limit: int | None) -> list[Item]:
    return list(client.list(tenant, **asked, limit=limit))


def _of_all_tenants(
    client: "PrefixClient", asked: Mapping[str, str | None], sort: Sort, limit: int | None
) -> list[Item]:
    """Returns the adapters of all tenants as one listing; those that `sort` does not tell apart by their names."""

    def place(item: Item) -> tuple[Any, ...]:
        name = item["tenant"], item["adapter"]
        if sort is Sort.CREATED:
            return -datetime.fromisoformat(item["latest"]["created"]).timestamp(), *name
        return name if sort is Sort.NAME else (-item[sort.value.removeprefix("-")], *name)

    listings = []
    for tenant in client.tenants():
        with contextlib.suppress(NotFound):  # it was deleted meanwhile
            listings.append(_adapters(client, tenant["tenant"], asked, limit))
    return list(heapq.merge(*listings, key=place))[:limit]


def _listed(item: Item, *, with_tenant: bool) -> list[object]:
    latest = item["latest"]
    return [
        f"{item['tenant']}/{item['adapter']}" if with_tenant else item["adapter"],
        latest["version"],
        latest["num_virtual_tokens"],
        latest["dtype"],
        human_bytes(item["bytes"]),
        human_time(latest["created"]),
        ", ".join(f"{name}={number}" for name, number in item["aliases"].items()),
        latest["base_model_name_or_path"],
    ]


def versions(
    adapter: AdapterName,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    as_json: Json = False,
) -> None:
    """List the versions of an adapter, newest first.

    `inspect` shows the whole of an annotation that is cut short here, and the model card.
    """
    with connect(url, api_key) as client, working(f"listing the versions of {adapter}"):
        items = client.versions(adapter)
        names = [f"{item['tenant']}/{item['adapter']}@{item['version']}" for item in items]
        with ThreadPoolExecutor(_IN_PARALLEL) as threads:
            annotations = list(threads.map(client.annotations, names))
    if as_json:
        print_json({"items": [{**item, "annotations": it} for item, it in zip(items, annotations, strict=True)]})
        return
    noted = [" ".join(f"{key}={_short(text)}" for key, text in it.items()) for it in annotations]
    columns = ["version", "created (UTC)", "tokens", "dtype", "size", "aliases", "digest"]
    rows = [_version(item) for item in items]
    if any(noted):
        columns.append("annotations")
        rows = [[*row, text] for row, text in zip(rows, noted, strict=True)]
    print_table(f"Versions of {adapter}", columns, rows)


def _version(item: Item) -> list[object]:
    size, aliases = human_bytes(item["size"]["key_values"]), ", ".join(item["aliases"])
    created = human_time(item["created"])
    return [item["version"], created, item["num_virtual_tokens"], item["dtype"], size, aliases, item["digest"]]


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST_NOTE else f"{text[: _LONGEST_NOTE - 1]}…"


def remove(
    reference: Annotated[
        str,
        typer.Argument(
            metavar="TENANT/ADAPTER[@…]",
            help="An adapter; @7 or @sha256:… is one version of it.",
            autocompletion=complete_adapter,
        ),
    ],
    yes: Yes = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    as_json: Json = False,
) -> None:
    """Delete an adapter, or one version that no alias points at."""
    confirm(f"delete {reference}" if "@" in reference else f"delete {reference} with all its versions", yes=yes)
    with connect(url, api_key) as client:
        client.delete(reference)
    report(f"deleted {reference}", {"deleted": reference}, as_json=as_json)
