"""`publish` and `compose`: how an adapter gets to the service."""

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.progress import wrap_file

from prefix_service.checkpoints.remote.address import Address, is_address, parse_address
from prefix_service.cli.commands.publication import Extras, published, send, tell_new_tenant
from prefix_service.cli.commands.publishing_folders import named_after_folders, publish_folders, tell_outcomes
from prefix_service.cli.completion import complete_adapter
from prefix_service.cli.console import errors_console, note, print_json, say, working
from prefix_service.cli.options import DEFAULT_URL, ApiKey, BaseConfig, Config, Json, Url, connect
from prefix_service.errors import InvalidConfig, InvalidRequest
from prefix_service.prefix.file_names import CONFIG_NAME
from prefix_service.prefix.references import parse_qualified
from prefix_service.system.sizes import human_bytes

if TYPE_CHECKING:
    from prefix_service.client import Fingerprint, PrefixClient

BaseModel = Annotated[
    Path | None,
    typer.Option(
        "--base-model",
        metavar="FOLDER",
        help="The folder of the base model: its fingerprint is stored with the version, and workers compare it with "
        "their model. A version that exists gets it too.",
        exists=True,
        file_okay=False,
    ),
]
Note = Annotated[str | None, typer.Option("--note", help="Why this version: the annotation note.")]
Annotate = Annotated[
    list[str] | None,
    typer.Option("--annotate", metavar="KEY=VALUE", help="A text that stays with the version, as run=17; repeatable."),
]

_MOST_BYTES: Final = 2 << 30
"""The most bytes of weights that are downloaded if the service does not say how many it accepts."""


def register(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    app.command()(publish)
    app.command()(compose)


def publish(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE TENANT/ADAPTER",
            help="An adapter's folder, a full training checkpoint, hf://owner/repo[@revision][/path], s3://bucket/path "
            "or oci://registry/repository:tag; and what to publish it as. Or with --tenant any number of folders.",
        ),
    ],
    tenant: Annotated[
        str | None, typer.Option("--tenant", help="Publish each folder as an adapter of this tenant, by its own name.")
    ] = None,
    config: Config = None,
    base_config: BaseConfig = None,
    base_model: BaseModel = None,
    note_text: Note = None,
    annotate: Annotate = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    as_json: Json = False,
) -> None:
    """Publish trained adapters as new versions.

    The prefix of a full training checkpoint is cut out first. A folder's README.md becomes the version's model card,
    the recipe of a compiled prefix its annotations. An adapter that is kept elsewhere is downloaded to this machine,
    and converted as `convert` does if it is a pickle or of a foreign layout.
    """
    extras = Extras(
        None if base_config is None else base_config.read_bytes(),
        None if base_model is None else _fingerprint(base_model),
        parse_annotations(annotate or [], note_text),
    )
    if tenant is not None:
        if config is not None:
            raise typer.BadParameter("--config is that of one adapter: with --tenant each folder has its own")
        adapters = named_after_folders(words, tenant)
        with connect(url, api_key, shows_progress=True) as client:
            outcomes = publish_folders(client, adapters, extras)
        tell_outcomes(outcomes, as_json=as_json)
        return
    if len(words) != 2:
        raise typer.BadParameter("name one SOURCE and its TENANT/ADAPTER, or folders and --tenant TENANT")
    adapter = words[1]
    if is_address(words[0]):
        address = parse_address(words[0])
        with connect(url, api_key) as client:
            version, is_new = _publish_address(client, address, adapter, config, base_config, extras)
        _tell_published(version, is_new=is_new, as_json=as_json)
        return
    source = Path(words[0])
    if not source.exists():
        raise typer.BadParameter(f"there is no {source}")
    with connect(url, api_key) as client:
        version, is_new = _publish_source(client, source, adapter, config, extras)
    _tell_published(version, is_new=is_new, as_json=as_json)


def _fingerprint(folder: Path) -> "Fingerprint":
    from prefix_service.checkpoints.base_models import read_fingerprint

    return read_fingerprint(folder)


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


def _publish_source(
    client: "PrefixClient", source: Path, adapter: str, config: Path | None, extras: Extras
) -> tuple[Mapping[str, Any], bool]:
    """Publish one adapter with a bar for its bytes. Returns the version, and whether it is new."""
    from prefix_service.checkpoints.sources import prepare_upload, weight_files

    beside = (source if source.is_dir() else source.parent) / CONFIG_NAME
    if config is None and not beside.is_file():
        weight_files(source)  # `convert` makes a config for a pickle, and its error says so
        raise InvalidConfig(f"there is no {beside}: name the adapter's config with --config")
    upload = prepare_upload(source, config)
    if upload.cut_from is not None:
        note(f"cut out the prefix: {upload.cut_from}, {human_bytes(upload.size)}")
    shown = wrap_file(
        upload.weights,
        upload.size,
        description="uploading",
        console=errors_console,
        transient=True,
        disable=not errors_console.is_terminal,
    )
    with upload.weights, shown as weights:
        return send(client, adapter, upload, weights, extras)


def _publish_address(
    client: "PrefixClient",
    address: Address,
    adapter: str,
    config: Path | None,
    base_config: Path | None,
    extras: Extras,
) -> tuple[Mapping[str, Any], bool]:
    """Downloads an adapter from an address and publishes it. Returns the version, and whether it is new."""
    from prefix_service.checkpoints.remote.download import downloaded

    parse_qualified(adapter)  # before the download
    most = client.whoami().get("max_upload_bytes", _MOST_BYTES)  # a service before this release does not say
    with contextlib.ExitStack() as stack:
        with working(f"downloading {address}"):
            found = stack.enter_context(downloaded(address, most, config=config, base_config=base_config))
        if found.converted is not None:
            note(f"converted: {found.converted}")
        described = {**found.annotations, **extras.annotations}
        return _publish_source(client, found.folder, adapter, None, replace(extras, annotations=described))


def _tell_published(version: Mapping[str, Any], *, is_new: bool, as_json: bool) -> None:
    if as_json:
        print_json({**version, "created_now": is_new})
        return
    say(published(version, is_new=is_new))
    say(f"digest {version['digest']}")
    if version.get("tenant_created"):
        tell_new_tenant(version["tenant"])


def compose(
    adapter: Annotated[str, typer.Argument(metavar="TENANT/ADAPTER", help="Where to publish.")],
    references: Annotated[
        list[str],
        typer.Argument(
            metavar="TENANT/ADAPTER[@…]",
            help="The prefixes, in the order of their tokens.",
            autocompletion=complete_adapter,
        ),
    ],
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    as_json: Json = False,
) -> None:
    """Publish the concatenation of prefixes as a new version."""
    with connect(url, api_key) as client:
        version, is_new = client.compose(adapter, references)
    _tell_published(version, is_new=is_new, as_json=as_json)
