"""`residency`: what is in memory, where and why; bring a version there, or take it out."""

from collections.abc import Mapping
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from prefix_service.cli.console import print_json, print_table, report, say, used_of, working
from prefix_service.cli.options import DEFAULT_URL, ApiKey, Json, Ref, Url, connect
from prefix_service.system.sizes import human_bytes


class _ShowByDefault(TyperGroup):
    """`residency` alone or with options is `residency show`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or (args[0].startswith("-") and args[0] not in ctx.help_option_names):
            args = ["show", *args]
        return super().parse_args(ctx, args)


residency_app = typer.Typer(cls=_ShowByDefault, help="What is in memory; alone it is `residency show`.")


def register(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    app.add_typer(residency_app, name="residency")


@residency_app.command("show")
def show(
    limit: Annotated[int, typer.Option(min=1, metavar="N", help="At most so many tenants and versions.")] = 20,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    as_json: Json = False,
) -> None:
    """Show what is in memory, of which tenants and versions. It is that of the process that answers."""
    with connect(url, api_key) as client:
        found = client.residency(limit)
    if as_json:
        print_json(found)
        return
    columns = ["tier", "used", "pinned", "hit ratio", "evictions"]
    print_table("Memory", columns, [_tier(tier) for tier in found["tiers"]])
    shares = sorted(found["tenants"], key=lambda share: share["used"], reverse=True)[:limit]
    say()
    print_table("Tenants", ["tenant", "tier", "used of guaranteed share"], [_share(share) for share in shares])
    columns = ["version", "device", "host", "renderings", "uses", "readers", "why"]
    say()
    print_table("Largest versions", columns, [_resident(version) for version in found["resident"]])


@residency_app.command("load")
def load(
    reference: Ref,
    pin: Annotated[bool, typer.Option("--pin", help="Keep it there until it is unloaded.")] = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    as_json: Json = False,
) -> None:
    """Load a version into memory and wait. Without --pin a pinned version may leave memory again."""
    with connect(url, api_key) as client, working(f"loading {reference}"):
        state = client.load(reference, pinned=pin)
    if as_json:
        print_json(state)
        return
    say(f"{reference} is in memory {where(state)}")


@residency_app.command("unload")
def unload(reference: Ref, url: Url = DEFAULT_URL, api_key: ApiKey = None, as_json: Json = False) -> None:
    """Take a version out of memory; the next request loads it again."""
    with connect(url, api_key) as client:
        client.unload(reference)
    report(f"unloaded {reference}", {"unloaded": reference}, as_json=as_json)


def where(state: Mapping[str, Any]) -> str:
    """Returns in words where a version is in memory: of one worker process alone, if the service has several."""
    pinned = ", pinned" if state["pinned"] else ""
    processes = state.get("processes", 1)  # services of earlier releases do not say
    process = f" in worker process {state['process']}, one of {processes}" if processes > 1 else ""
    return f"on {state['device']}{process}{pinned}"


def _tier(tier: Mapping[str, Any]) -> list[object]:
    lookups = tier["hits"] + tier["misses"] + tier["waits"]
    ratio = f"{tier['hits'] / lookups:.1%}" if lookups else "no lookups"
    name = tier["name"] if tier["place"] == tier["name"] else f"{tier['name']} {tier['place']}"
    used, pinned = used_of(tier["used"], tier["budget"], human_bytes), human_bytes(tier["pinned"])
    return [name, used, pinned, ratio, tier["evictions"]]


def _share(share: Mapping[str, Any]) -> list[object]:
    return [share["tenant"], share["tier"], used_of(share["used"], share["share"], human_bytes)]


def _resident(found: Mapping[str, Any]) -> list[object]:
    version = f"{found['tenant']}/{found['adapter']}@{found['version']}"
    device, host = human_bytes(found["device_bytes"]), human_bytes(found["host_bytes"])
    return [version, device, host, found["renderings"], found["uses"], found["readers"], found["reason"]]
