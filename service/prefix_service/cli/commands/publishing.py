"""`publish`, `compose` and `convert`: how an adapter gets to the service."""

import contextlib
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn, wrap_file

from prefix_service.checkpoints.remote.address import Address, is_address, parse_address
from prefix_service.cli.completion import complete_adapter
from prefix_service.cli.console import complain, error_line, errors_console, note, print_json, say, working
from prefix_service.cli.options import DEFAULT_URL, ApiKey, Json, Url, connect
from prefix_service.errors import (
    Conflict,
    InvalidConfig,
    InvalidInput,
    InvalidReference,
    InvalidRequest,
    PrefixServiceError,
    TooLarge,
)
from prefix_service.prefix.file_names import CONFIG_NAME
from prefix_service.prefix.references import check_name, parse_qualified
from prefix_service.system.sizes import human_bytes

if TYPE_CHECKING:
    from prefix_service.client import Fingerprint, PrefixClient

Config = Annotated[
    Path | None, typer.Option("--config", help="The adapter_config.json, where it is elsewhere.", exists=True)
]
BaseConfig = Annotated[
    Path | None,
    typer.Option("--base-config", help="The base model's config.json, for dimensions that are missing.", exists=True),
]

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

_IN_PARALLEL: Final = 4
_MOST_BYTES: Final = 2 << 30
"""The most bytes of weights that are downloaded if the service does not say how many it accepts."""

_OF_ONE_FOLDER: Final = (InvalidInput, TooLarge, Conflict)
"""Errors that say nothing of the other folders."""


def register(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    app.command()(publish)
    app.command()(compose)
    app.command()(convert)


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
    annotations = parse_annotations(annotate or [], note_text)
    base = None if base_config is None else base_config.read_bytes()
    fingerprint = None if base_model is None else _fingerprint(base_model)
    if tenant is not None:
        if config is not None:
            raise typer.BadParameter("--config is that of one adapter: with --tenant each folder has its own")
        adapters = _named_after_folders(words, tenant)
        with connect(url, api_key, shows_progress=True) as client:
            outcomes = _publish_folders(client, adapters, base, fingerprint, annotations)
        _tell_outcomes(outcomes, as_json=as_json)
        return
    if len(words) != 2:
        raise typer.BadParameter("name one SOURCE and its TENANT/ADAPTER, or folders and --tenant TENANT")
    adapter = words[1]
    if is_address(words[0]):
        address = parse_address(words[0])
        with connect(url, api_key) as client:
            version, is_new = _publish_address(client, address, adapter, config, base_config, fingerprint, annotations)
        _tell_published(version, is_new=is_new, as_json=as_json)
        return
    source = Path(words[0])
    if not source.exists():
        raise typer.BadParameter(f"there is no {source}")
    with connect(url, api_key) as client:
        version, is_new = _publish_source(client, source, adapter, config, base, fingerprint, annotations)
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
    client: "PrefixClient",
    source: Path,
    adapter: str,
    config: Path | None,
    base: bytes | None,
    fingerprint: "Fingerprint | None",
    annotations: Mapping[str, str],
) -> tuple[Mapping[str, Any], bool]:
    """Publish one adapter with a bar for its bytes. Returns the version, and whether it is new."""
    from prefix_service.checkpoints.sources import prepare_upload

    beside = (source if source.is_dir() else source.parent) / CONFIG_NAME
    if config is None and not beside.is_file():
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
        described = {**upload.recipe, **annotations}
        return client.publish_files(
            adapter,
            upload.config,
            weights,
            base,
            card=upload.card,
            annotations=described,
            base_model=fingerprint or upload.base_model,
        )


def _publish_address(
    client: "PrefixClient",
    address: Address,
    adapter: str,
    config: Path | None,
    base_config: Path | None,
    fingerprint: "Fingerprint | None",
    annotations: Mapping[str, str],
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
        base = None if base_config is None else base_config.read_bytes()
        described = {**found.annotations, **annotations}
        return _publish_source(client, found.folder, adapter, None, base, fingerprint, described)


@dataclass(frozen=True, slots=True)
class _Outcome:
    """The result for one folder: a version, and whether it is new; or an error; or neither, if it was never tried."""

    folder: Path
    adapter: str
    version: Mapping[str, Any] | None = None
    is_new: bool = False
    error: PrefixServiceError | None = None


def _named_after_folders(words: Sequence[str], tenant: str) -> dict[str, Path]:
    """Returns the folder of each adapter `tenant/name`, where `name` is the folder's own name.

    Raises:
        typer.BadParameter: a word is no folder.
        InvalidReference: a folder's name is not one that an adapter can have.
        InvalidRequest: two folders have one name.
    """
    check_name("tenant", tenant)
    adapters: dict[str, Path] = {}
    for word in words:
        folder = Path(word)
        if not folder.is_dir():
            raise typer.BadParameter(f"{word} is no folder: with --tenant each adapter is named after its folder")
        try:
            adapter = f"{tenant}/{check_name('adapter', Path(os.path.abspath(folder)).name)}"  # noqa: PTH100 - of a link, its own name
        except InvalidReference as error:
            raise InvalidReference(
                f"{error}. So {folder} cannot be published by its own name: rename it, or publish it alone as "
                f"{tenant}/NAME"
            ) from error
        if adapter in adapters:
            raise InvalidRequest(f"{adapters[adapter]} and {folder} would both be {adapter}: publish one of them alone")
        adapters[adapter] = folder
    return adapters


def _publish_folders(
    client: "PrefixClient",
    adapters: Mapping[str, Path],
    base: bytes | None,
    fingerprint: "Fingerprint | None",
    annotations: Mapping[str, str],
) -> list[_Outcome]:
    """Publish many folders, some in parallel, with a bar that counts them. Returns their outcomes in the same order.

    An error of one folder leaves the others alone; after one that they would all meet, no other is begun.
    """
    from prefix_service.checkpoints.sources import prepare_upload

    stopped = threading.Event()
    columns = (TextColumn("publishing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=errors_console, transient=True, disable=not errors_console.is_terminal) as progress:
        task = progress.add_task("", total=len(adapters))

        def publish_folder(adapter: str, folder: Path) -> _Outcome:
            if stopped.is_set():
                return _Outcome(folder, adapter)
            try:
                upload = prepare_upload(folder)
                described = {**upload.recipe, **annotations}
                with upload.weights as weights:
                    version, is_new = client.publish_files(
                        adapter,
                        upload.config,
                        weights,
                        base,
                        card=upload.card,
                        annotations=described,
                        base_model=fingerprint or upload.base_model,
                    )
            except PrefixServiceError as error:
                if not isinstance(error, _OF_ONE_FOLDER):
                    stopped.set()
                return _Outcome(folder, adapter, error=error)
            finally:
                progress.advance(task)
            return _Outcome(folder, adapter, version, is_new)

        with ThreadPoolExecutor(_IN_PARALLEL) as threads:
            try:
                return list(threads.map(publish_folder, adapters, adapters.values()))
            finally:
                stopped.set()  # Ctrl-C: what has begun ends, the rest is not begun


def _tell_outcomes(outcomes: Sequence[_Outcome], *, as_json: bool) -> None:
    """Show what became of many folders.

    Raises:
        typer.Exit: with status 1, unless all of them are published.
    """
    versions = [(outcome.version, outcome.is_new) for outcome in outcomes if outcome.version is not None]
    failed = [(outcome, outcome.error) for outcome in outcomes if outcome.error is not None]
    left = [outcome for outcome in outcomes if outcome.version is None and outcome.error is None]
    if as_json:
        print_json(
            {
                "items": [{**version, "created_now": is_new} for version, is_new in versions],
                "failed": [
                    {
                        "folder": str(outcome.folder),
                        "code": error.code,
                        "error": str(error),
                        "request_id": error.request_id,
                    }
                    for outcome, error in failed
                ],
                "not_tried": [str(outcome.folder) for outcome in left],
            }
        )
    else:
        for version, is_new in versions:
            say(_published(version, is_new=is_new))
        new = sum(is_new for _, is_new in versions)
        counts = {
            "published": new,
            "already there": len(versions) - new,
            "failed": len(failed),
            "not tried": len(left),
        }
        say(", ".join(f"{count} {what}" for what, count in counts.items() if count))
        for tenant in dict.fromkeys(version["tenant"] for version, _ in versions if version.get("tenant_created")):
            _tell_new_tenant(tenant)
    for outcome, error in failed:
        complain(f"{outcome.folder}: {error_line(error)}")
    if failed:
        raise typer.Exit(1)


def _published(version: Mapping[str, Any], *, is_new: bool) -> str:
    done = "published" if is_new else "already there as"
    return f"{done} {version['tenant']}/{version['adapter']}@{version['version']}"


def _tell_new_tenant(tenant: str) -> None:
    say(f"tenant {tenant} is new: it came into being with this")


def _tell_published(version: Mapping[str, Any], *, is_new: bool, as_json: bool) -> None:
    if as_json:
        print_json({**version, "created_now": is_new})
        return
    say(_published(version, is_new=is_new))
    say(f"digest {version['digest']}")
    if version.get("tenant_created"):
        _tell_new_tenant(version["tenant"])


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


def convert(
    source: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A file or a folder.", exists=True)],
    output: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where the adapter goes.")],
    config: Config = None,
    base_config: BaseConfig = None,
    unsafe: Annotated[
        bool, typer.Option("--unsafe", help="Open a pickle that may run code. Know who wrote it.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Turn a foreign or pickled checkpoint into an adapter folder.

    It is opened on this machine, by the strictest loader that can read it. The folder holds safetensors, which run no
    code.
    """
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
