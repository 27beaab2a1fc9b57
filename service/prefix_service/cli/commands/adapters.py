"""`list`, `versions`, `inspect`, `diff` and `rm`: what is published."""

import contextlib
import difflib
import heapq
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from prefix_service.cli.commands.precision import show_precision
from prefix_service.cli.completion import complete_adapter
from prefix_service.cli.console import (
    human_time,
    print_fields,
    print_json,
    print_table,
    report,
    say,
    say_lines,
    working,
)
from prefix_service.cli.options import (
    DEFAULT_URL,
    AdapterName,
    ApiKey,
    Json,
    Ref,
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
    from prefix_service.prefix.comparison import LayerDifference

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
    app.command()(inspect)
    app.command()(diff)
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


_SHOWN_APART: Final = frozenset(
    {"config", "size", "residency", "annotations", "card", "base_model", "float8", "created"},
)


def inspect(
    reference: Ref,
    float8: Annotated[bool, typer.Option("--float8", help="Fetch it as float8 too: its error and its bytes.")] = False,
    precision: Annotated[
        bool,
        typer.Option(
            "--precision",
            help="Instead: what does each pair of dtypes cost a model's predictions? Needs --model and --text.",
        ),
    ] = False,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="MODEL", help="The adapter's base model: a folder, or a name on Hugging Face."),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            "--text", metavar="FILE", help="What the model reads behind the prefix, UTF-8.", exists=True, dir_okay=False
        ),
    ] = None,
    most: Annotated[
        int, typer.Option("--most", min=1, metavar="TOKENS", help="How much of the text is read with --precision.")
    ] = 512,
    device: Annotated[
        str, typer.Option("--device", metavar="DEVICE", help="Where the model computes: cpu, cuda, cuda:1.")
    ] = "cpu",
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    as_json: Json = False,
) -> None:
    """Show what the service knows of a version.

    That is its dimensions, sizes, residency, annotations and model card; --json has its config too. --float8 shows what
    float8 on the wire would cost keys and values, and --precision what two dtypes cost the predictions of its model,
    which computes in float32. The text is tokenized as it is, special tokens included.
    """
    if precision != (model is not None) or precision != (text is not None):
        raise typer.BadParameter("--precision needs --model MODEL and --text FILE, and these are for --precision")
    if model is not None and text is not None:
        show_precision(reference, model, text, most, device, url, api_key, as_json=as_json)
        return
    with connect(url, api_key) as client:
        found = dict(client.inspect(reference))
        same = f"{found['tenant']}/{found['adapter']}@{found['version']}"
        found["annotations"] = client.annotations(same)
        found["card"] = client.card(same)
        found["base_model"] = client.base_model(same).known()
        if float8:
            found["float8"] = asdict(client.float8_error(reference))
    if as_json:
        print_json(found)
        return
    shown = {name: value for name, value in found.items() if name not in _SHOWN_APART}
    shown["created (UTC)"] = human_time(found["created"])
    shown |= {f"size: {name}": human_bytes(count) for name, count in found["size"].items()}
    shown |= {f"residency: {name}": value for name, value in found["residency"].items()}
    shown |= {f"annotation: {key}": value for key, value in found["annotations"].items()}
    shown |= {f"base model: {name}": _written(value) for name, value in found["base_model"].items()}
    shown["aliases"] = ", ".join(found["aliases"])
    if float8:
        shown |= _float8(found["float8"])
    print_fields(reference, shown)
    if found["card"]:
        say_lines(found["card"])


def _float8(error: Mapping[str, Any]) -> dict[str, str]:
    saved = f"{human_bytes(error['nbytes'])} instead of {human_bytes(error['bfloat16_nbytes'])} as bfloat16"
    return {"float8: size": saved} | {
        f"float8: error of {part}": "max {max_absolute:.3g}, mean {mean_absolute:.3g}; relative "
        "max {max_relative:.1%}, mean {mean_relative:.1%}".format(**error[part])
        for part in ("keys", "values")
    }


def diff(
    first: Ref,
    second: Ref,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    as_json: Json = False,
) -> None:
    """Show how two versions differ, down to each layer.

    That is their configs, sizes, annotations and model cards, and how far keys and values are apart, layer by layer.
    """
    from prefix_service.client.prefixes.difference import differences

    with connect(url, api_key) as client, working(f"comparing {first} and {second}"):
        about = [client.inspect(reference) for reference in (first, second)]
        # By digest: an alias may move meanwhile.
        fixed = [f"{it['tenant']}/{it['adapter']}@{it['digest']}" for it in about]
        one, other = map(client.get, fixed)
        annotations, cards = list(map(client.annotations, fixed)), list(map(client.card, fixed))
    names = [f"{it['tenant']}/{it['adapter']}@{it['version']}" for it in about]
    layers: list[LayerDifference] | None = None
    reason: str | None = None
    try:
        layers = differences(one, other)
    except InvalidRequest as error:
        reason = str(error)
    changed = _changed(*map(_comparable, about, annotations))
    if as_json:
        apart = None if layers is None else [asdict(layer) for layer in layers]
        shown = [{"version": name, "digest": it["digest"]} for name, it in zip(names, about, strict=True)]
        changed |= _changed(*({"card": card} for card in cards))
        print_json({"first": shown[0], "second": shown[1], "changed": changed, "layers": apart, "reason": reason})
        return
    if is_same := about[0]["digest"] == about[1]["digest"]:
        say(f"{names[0]} and {names[1]} have the same content: {about[0]['digest']}")
        if fixed[0] == fixed[1]:
            return
    # Two digests in a row have room on no terminal, and `versions` shows them.
    rows: list[list[object]] = [
        [name, *map(_written, pair)] for name, pair in changed.items() if name not in ("digest", "weights")
    ]
    print_table(f"{names[0]} and {names[1]}", ["what differs", *names], rows)
    if reason is not None:
        say(reason)
    elif layers is not None and not is_same:
        _show_layers(layers)
    before, after = (card.splitlines() for card in cards)
    if differing := list(
        difflib.unified_diff(before, after, f"card of {names[0]}", f"card of {names[1]}", lineterm="")
    ):
        say()
        say_lines("\n".join(differing))


def _comparable(version: Item, annotations: Mapping[str, str]) -> dict[str, Any]:
    """Returns what may differ between two versions: when and of what they were made, sizes, the config's fields, and
    annotations."""
    sizes = {f"bytes of {name}": count for name, count in version["size"].items()}
    config = {f"config: {name}": value for name, value in sorted(version["config"].items())}
    noted = {f"annotation: {key}": text for key, text in annotations.items()}
    fixed = {name: version[name] for name in ("created", "digest", "weights", "dtype")}
    return fixed | sizes | config | noted


def _changed(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Returns both values of what differs; None where there is none."""
    names = dict.fromkeys([*first, *second])
    return {name: [first.get(name), second.get(name)] for name in names if first.get(name) != second.get(name)}


def _written(value: Any) -> Any:
    return value if value is None or isinstance(value, str) else json.dumps(value)


def _show_layers(layers: "list[LayerDifference]") -> None:
    columns = ["layer", "keys: distance", "keys: cosine", "values: distance", "values: cosine"]
    rows: list[list[object]] = [
        [it.layer, *(text for part in (it.keys, it.values) for text in (f"{part.relative:.4g}", f"{part.cosine:.6f}"))]
        for it in layers
    ]
    print_table("Distance: |a - b| / max(|a|, |b|), from 0 for equal to 2 for opposite", columns, rows)


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
