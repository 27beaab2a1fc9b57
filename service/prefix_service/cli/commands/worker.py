"""`publish`, `fetch`, `list`, `inspect`, `rm` and `convert`: the commands of who uses a service."""

import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Final, get_args

import typer
from rich.progress import wrap_file

from prefix_service.cli.console import (
    errors_console,
    human_bytes,
    human_time,
    note,
    print_json,
    print_table,
    say,
    say_lines,
)
from prefix_service.cli.options import DEFAULT_URL, ApiKey, Json, Ref, Url, Yes, confirm, connect
from prefix_service.errors import InvalidRequest
from prefix_service.prefix.form import KVDtype

Adapter = Annotated[str, typer.Argument(metavar="TENANT/ADAPTER", help="Where to publish.")]
Config = Annotated[
    Path | None, typer.Option("--config", help="The adapter_config.json, where it is elsewhere.", exists=True)
]
BaseConfig = Annotated[
    Path | None,
    typer.Option("--base-config", help="The base model's config.json, for dimensions that are missing.", exists=True),
]
Note = Annotated[str | None, typer.Option("--note", help="Why this version: the annotation note.")]
Annotate = Annotated[
    list[str] | None,
    typer.Option("--annotate", metavar="KEY=VALUE", help="A text that stays with the version, as run=17; repeatable."),
]


def register(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    app.command()(publish)
    app.command()(compose)
    app.command()(fetch)
    app.command(name="list")(list_adapters)
    app.command()(versions)
    app.command()(inspect)
    app.command(name="rm")(remove)
    app.command()(convert)


def publish(
    source: Annotated[Path, typer.Argument(help="An adapter's folder, or a full training checkpoint.", exists=True)],
    adapter: Adapter,
    config: Config = None,
    base_config: BaseConfig = None,
    note_text: Note = None,
    annotate: Annotate = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    as_json: Json = False,
) -> None:
    """Publish a trained adapter as a new version; the prefix of a full training checkpoint is cut out first. The
    folder's README.md becomes the version's model card."""
    from prefix_service.checkpoints.sources import prepare_upload

    annotations = parse_annotations(annotate or [], note_text)
    upload = prepare_upload(source, config)
    if upload.cut_from is not None:
        note(f"cut out the prefix: {upload.cut_from}, {human_bytes(upload.size)}")
    base = None if base_config is None else base_config.read_bytes()
    shown = wrap_file(upload.weights, upload.size, description="uploading", console=errors_console, transient=True)
    with connect(url, api_key) as client, upload.weights, shown as weights:
        version, is_new = client.publish(
            adapter, upload.config, weights, base, card=upload.card, annotations=annotations
        )
    _tell_published(version, is_new=is_new, as_json=as_json)


def parse_annotations(pairs: list[str], note_text: str | None = None) -> dict[str, str]:
    """Returns annotations written as `key=value`, and a note as the annotation `note`.

    Raises:
        InvalidRequest: one has no `=`, or a key is given twice.
    """
    found: dict[str, str] = {}
    for pair in [*pairs, *([] if note_text is None else [f"note={note_text}"])]:
        key, separator, value = pair.partition("=")
        if not separator:
            raise InvalidRequest(f"--annotate takes KEY=VALUE, as in run=17, got {pair!r:.80}")
        if key in found:
            raise InvalidRequest(f"the annotation {key!r:.80} is given twice: give it once")
        found[key] = value
    return found


def compose(
    adapter: Adapter,
    references: Annotated[
        list[str], typer.Argument(metavar="TENANT/ADAPTER[@…]...", help="The prefixes, in the order of their tokens.")
    ],
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    as_json: Json = False,
) -> None:
    """Publish the concatenation of published prefixes as a new version."""
    with connect(url, api_key) as client:
        version, is_new = client.compose(adapter, references)
    _tell_published(version, is_new=is_new, as_json=as_json)


def _tell_published(version: Mapping[str, Any], *, is_new: bool, as_json: bool) -> None:
    if as_json:
        print_json({**version, "created_now": is_new})
        return
    done = "published" if is_new else "already there as"
    say(f"{done} {version['tenant']}/{version['adapter']}@{version['version']}")
    say(f"digest {version['digest']}")


def fetch(
    reference: Ref,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File to write; default: only show.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows.")] = 1,
    dtype: Annotated[str | None, typer.Option(help="float32, float16, bfloat16 or float8_e4m3fn.")] = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    as_json: Json = False,
) -> None:
    """Fetch a prefix as a worker would, and show or save its tensors (safetensors)."""
    from safetensors.torch import save_file

    with connect(url, api_key) as client:
        began = time.perf_counter()
        prefix = client.get(reference, batch_size=batch_size, dtype=_checked_dtype(dtype))
        seconds = time.perf_counter() - began
    tensors = {"attention_mask": prefix.attention_mask}
    for layer, (key, value) in enumerate(prefix.past_key_values):
        tensors |= {f"past_key_values.{layer}.key": key, f"past_key_values.{layer}.value": value}
    if output is not None:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, output)
    if as_json:
        print_json({**prefix.metadata, "batch_size": batch_size, "seconds": seconds, "bytes": prefix.kv.nbytes})
        return
    rows: list[list[object]] = [
        [name, " x ".join(map(str, tensor.shape)), str(tensor.dtype).removeprefix("torch.")]
        for name, tensor in list(tensors.items())[:5]
    ]
    if len(tensors) > len(rows):
        rows.append([f"… {len(tensors) - len(rows)} more", "", ""])
    title = f"{reference} = version {prefix.version}, {human_bytes(prefix.kv.nbytes)} in {seconds * 1000:.1f} ms"
    print_table(title, ["tensor", "shape", "dtype"], rows)
    if output is not None:
        say(f"saved to {output}")


def list_adapters(
    tenant: Annotated[str, typer.Argument(help="The tenant.")],
    base_model: Annotated[str | None, typer.Option(help="Only adapters of this base model.")] = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    as_json: Json = False,
) -> None:
    """List the adapters of a tenant."""
    with connect(url, api_key) as client:
        items = client.list(tenant, base_model)
    if as_json:
        print_json({"items": items})
        return
    columns = ["adapter", "latest", "tokens", "dtype", "size", "aliases", "base model"]
    print_table(f"Adapters of {tenant}", columns, [_listed(item) for item in items])


def versions(
    adapter: Annotated[str, typer.Argument(metavar="TENANT/ADAPTER", help="The adapter.")],
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    as_json: Json = False,
) -> None:
    """List the versions of an adapter, newest first."""
    from prefix_service.client import management

    with connect(url, api_key) as client:
        items = client.run(management.versions(adapter))
    if as_json:
        print_json({"items": items})
        return
    columns = ["version", "created (UTC)", "tokens", "dtype", "size", "aliases", "digest"]
    print_table(f"Versions of {adapter}", columns, [_version(item) for item in items])


def _version(item: Mapping[str, Any]) -> list[object]:
    size, aliases = human_bytes(item["size"]["key_values"]), ", ".join(item["aliases"])
    created = human_time(item["created"])
    return [item["version"], created, item["num_virtual_tokens"], item["dtype"], size, aliases, item["digest"]]


def _listed(item: Mapping[str, Any]) -> list[object]:
    latest = item["latest"]
    return [
        item["adapter"],
        latest["version"],
        latest["num_virtual_tokens"],
        latest["dtype"],
        human_bytes(latest["size"]["key_values"]),
        ", ".join(f"{name}={number}" for name, number in item["aliases"].items()),
        latest["base_model_name_or_path"],
    ]


_SHOWN_APART: Final = frozenset({"config", "size", "residency", "annotations", "card", "float8"})


def inspect(
    reference: Ref,
    float8: Annotated[bool, typer.Option("--float8", help="Fetch it as float8 too: its error and its bytes.")] = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    as_json: Json = False,
) -> None:
    """Show what the service knows of a version, its annotations and model card, and what float8 on the wire would cost
    it."""
    from prefix_service.client import management

    with connect(url, api_key) as client:
        found = dict(client.inspect(reference))
        same = f"{found['tenant']}/{found['adapter']}@{found['version']}"
        found["annotations"] = client.run(management.annotations(same))
        found["card"] = client.run(management.card(same))
        if float8:
            found["float8"] = asdict(client.float8_error(reference))
    if as_json:
        print_json(found)
        return
    shown = {name: value for name, value in found.items() if name not in _SHOWN_APART}
    shown |= {f"size: {name}": human_bytes(count) for name, count in found["size"].items()}
    shown |= {f"residency: {name}": value for name, value in found["residency"].items()}
    shown |= {f"annotation: {key}": value for key, value in found["annotations"].items()}
    shown["aliases"] = ", ".join(found["aliases"])
    if float8:
        shown |= _float8(found["float8"])
    print_table(reference, ["what", "value"], [[name, value] for name, value in shown.items()])
    if found["card"]:
        say_lines(found["card"])


def _float8(error: Mapping[str, Any]) -> dict[str, str]:
    saved = f"{human_bytes(error['nbytes'])} instead of {human_bytes(error['bfloat16_nbytes'])} as bfloat16"
    return {"float8: size": saved} | {
        f"float8: error of {part}": "max {max_absolute:.3g}, mean {mean_absolute:.3g}; relative "
        "max {max_relative:.1%}, mean {mean_relative:.1%}".format(**error[part])
        for part in ("keys", "values")
    }


def remove(
    reference: Annotated[
        str, typer.Argument(metavar="TENANT/ADAPTER[@…]", help="An adapter; @7 or @sha256:… is one version of it.")
    ],
    yes: Yes = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Delete an adapter with all its versions, or one version that no alias points at."""
    from prefix_service.client import management

    confirm(f"delete {reference}" if "@" in reference else f"delete {reference} with all its versions", yes=yes)
    with connect(url, api_key) as client:
        client.run(management.delete(reference))
    say(f"deleted {reference}")


def convert(
    source: Annotated[Path, typer.Argument(help="A checkpoint: a file or a folder.", exists=True)],
    output: Annotated[Path, typer.Argument(help="Folder for the safe adapter.")],
    config: Config = None,
    base_config: BaseConfig = None,
    unsafe: Annotated[
        bool, typer.Option("--unsafe", help="Open a pickle that may run code. Know who wrote it.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Turn a foreign or pickled checkpoint into a safe adapter folder, on this machine."""
    from prefix_service.checkpoints.convert import convert as run
    from prefix_service.checkpoints.convert import write
    from prefix_service.prefix.checkpoint import shown_names

    conversion = run(source, config=config, base_config=base_config, unsafe=unsafe)
    write(conversion, output)
    if as_json:
        shown = ("opened", "found", "config", "left_out")
        print_json({name: getattr(conversion, name) for name in shown})
        return
    for line in (f"opened {source} with {conversion.opened}", f"found {conversion.found}"):
        say(line)
    if left_out := conversion.left_out:
        say(f"left out {len(left_out)} entries that are not part of the prefix: {shown_names(left_out)}")
    say(f"wrote {output}")


def _checked_dtype(name: str | None) -> Any:
    known = get_args(KVDtype)
    if name is not None and name not in known:
        raise InvalidRequest(f"dtype must be one of {', '.join(known)}, got {name!r}")
    return name
