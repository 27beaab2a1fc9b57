"""`alias`: names that point at one version of an adapter, and move."""

from typing import Annotated

import typer

from prefix_service.cli.completion import complete_adapter
from prefix_service.cli.console import print_json, print_table, report, say, working
from prefix_service.cli.options import DEFAULT_URL, AdapterName, ApiKey, Json, Url, connect
from prefix_service.errors import InvalidRequest
from prefix_service.prefix.references import check_alias, parse_qualified

alias_app = typer.Typer(help="Point names at versions, and back. Workers that read TENANT/ADAPTER@ALIAS follow.")

Alias = Annotated[str, typer.Argument(metavar="ALIAS", help="The alias, as in prod.")]


def register(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    app.add_typer(alias_app, name="alias", no_args_is_help=True)


@alias_app.command("set")
def set_alias(
    adapter: AdapterName,
    alias: Alias,
    version: Annotated[int, typer.Argument(min=1, metavar="VERSION", help="The version's number.")],
    preload: Annotated[bool, typer.Option("--preload", help="Load the version into memory first.")] = False,
    if_match: Annotated[
        int | None, typer.Option(metavar="N", help="Only if the alias points at this version now.")
    ] = None,
    create_only: Annotated[bool, typer.Option("--create-only", help="Only if there is no such alias.")] = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    as_json: Json = False,
) -> None:
    """Point an alias at a version, which rolls that version out."""
    with connect(url, api_key) as client, working(f"moving {adapter}@{alias}"):
        is_new = client.put_alias(adapter, alias, version, preload=preload, if_match=if_match, create_only=create_only)
    if as_json:
        print_json({"alias": alias, "version": version, "created_now": is_new})
        return
    say(f"{'made ' if is_new else ''}{adapter}@{alias}: version {version}")


@alias_app.command("rollback")
def roll_back(
    name: Annotated[
        str,
        typer.Argument(metavar="TENANT/ADAPTER@ALIAS", help="The alias.", autocompletion=complete_adapter),
    ],
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    as_json: Json = False,
) -> None:
    """Point an alias back at the version that it named before. Once more undoes it."""
    tenant, reference = parse_qualified(name)
    if not reference.explicit or reference.immutable:
        raise InvalidRequest(f"{name} names no alias: write it as {tenant}/{reference.adapter}@prod")
    alias, adapter = check_alias(reference.selector), f"{tenant}/{reference.adapter}"
    with connect(url, api_key) as client, working(f"moving {name}"):
        version, before = client.rollback(adapter, alias)
    if as_json:
        print_json({"alias": alias, "version": version, "before": before})
        return
    say(f"{name}: version {version}, back from {before}")


@alias_app.command("list")
def list_aliases(adapter: AdapterName, url: Url = DEFAULT_URL, api_key: ApiKey = None, as_json: Json = False) -> None:
    """List the aliases of an adapter, and where each points."""
    with connect(url, api_key) as client:
        found = client.aliases(adapter)
    if as_json:
        print_json({"items": [{"alias": name, "version": number} for name, number in found.items()]})
        return
    print_table(f"Aliases of {adapter}", ["alias", "version"], [[name, number] for name, number in found.items()])


@alias_app.command("rm")
def remove_alias(
    adapter: AdapterName, alias: Alias, url: Url = DEFAULT_URL, api_key: ApiKey = None, as_json: Json = False
) -> None:
    """Forget an alias; its version stays."""
    with connect(url, api_key) as client:
        client.delete_alias(adapter, alias)
    report(f"deleted {adapter}@{alias}", {"deleted": f"{adapter}@{alias}"}, as_json=as_json)
