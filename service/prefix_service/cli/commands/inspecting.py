"""`inspect` and `diff`: all that the service knows of a version, and how two versions differ."""

import difflib
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from prefix_service.cli.commands.precision import PrecisionOptions, show_precision
from prefix_service.cli.console import human_time, print_fields, print_json, print_table, say, say_lines, working
from prefix_service.cli.options import DEFAULT_URL, ApiKey, Json, Ref, Url, connect, unfolded
from prefix_service.errors import InvalidRequest
from prefix_service.system.sizes import human_bytes

if TYPE_CHECKING:
    from prefix_service.prefix.comparison import LayerDifference

_SHOWN_APART: Final = frozenset(
    {"config", "size", "residency", "annotations", "card", "base_model", "float8", "created"},
)


def register(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    app.command()(inspect)
    app.command()(diff)


@unfolded
def inspect(
    reference: Ref,
    precision: PrecisionOptions,
    float8: Annotated[bool, typer.Option("--float8", help="Fetch it as float8 too: its error and its bytes.")] = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    as_json: Json = False,
) -> None:
    """Show what the service knows of a version.

    That is its dimensions, sizes, residency, annotations and model card; --json has its config too. --float8 shows what
    float8 on the wire would cost keys and values, and --precision what two dtypes cost the predictions of its model,
    which computes in float32. The text is tokenized as it is, special tokens included.
    """
    if (wanted := precision.model_and_text()) is not None:
        show_precision(reference, *wanted, precision.most, precision.device, url, api_key, as_json=as_json)
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


def _comparable(version: Mapping[str, Any], annotations: Mapping[str, str]) -> dict[str, Any]:
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
