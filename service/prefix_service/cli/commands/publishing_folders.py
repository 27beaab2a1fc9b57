"""Many folders that are published by one command: some in parallel, each by its own name."""

import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from prefix_service.cli.commands.publication import Extras, published, send, tell_new_tenant
from prefix_service.cli.console import complain, error_line, errors_console, print_json, say
from prefix_service.errors import (
    Conflict,
    InvalidInput,
    InvalidReference,
    InvalidRequest,
    PrefixServiceError,
    TooLarge,
)
from prefix_service.prefix.references import check_name

if TYPE_CHECKING:
    from prefix_service.client import PrefixClient

_IN_PARALLEL: Final = 4
_OF_ONE_FOLDER: Final = (InvalidInput, TooLarge, Conflict)
"""Errors that say nothing of the other folders."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result for one folder: a version, and whether it is new; or an error; or neither, if it was never tried."""

    folder: Path
    adapter: str
    version: Mapping[str, Any] | None = None
    is_new: bool = False
    error: PrefixServiceError | None = None


def named_after_folders(words: Sequence[str], tenant: str) -> dict[str, Path]:
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


def publish_folders(client: "PrefixClient", adapters: Mapping[str, Path], extras: Extras) -> list[Outcome]:
    """Publish many folders, some in parallel, with a bar that counts them. Returns their outcomes in the same order.

    An error of one folder leaves the others alone; after one that they would all meet, no other is begun.
    """
    from prefix_service.checkpoints.sources import prepare_upload

    stopped = threading.Event()
    columns = (TextColumn("publishing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=errors_console, transient=True, disable=not errors_console.is_terminal) as progress:
        task = progress.add_task("", total=len(adapters))

        def publish_one(adapter: str, folder: Path) -> Outcome:
            if stopped.is_set():
                return Outcome(folder, adapter)
            try:
                upload = prepare_upload(folder)
                with upload.weights as weights:
                    version, is_new = send(client, adapter, upload, weights, extras)
            except PrefixServiceError as error:
                if not isinstance(error, _OF_ONE_FOLDER):
                    stopped.set()
                return Outcome(folder, adapter, error=error)
            finally:
                progress.advance(task)
            return Outcome(folder, adapter, version, is_new)

        with ThreadPoolExecutor(_IN_PARALLEL) as threads:
            try:
                return list(threads.map(publish_one, adapters, adapters.values()))
            finally:
                stopped.set()  # Ctrl-C: what has begun ends, the rest is not begun


def tell_outcomes(outcomes: Sequence[Outcome], *, as_json: bool) -> None:
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
            say(published(version, is_new=is_new))
        new = sum(is_new for _, is_new in versions)
        counts = {
            "published": new,
            "already there": len(versions) - new,
            "failed": len(failed),
            "not tried": len(left),
        }
        say(", ".join(f"{count} {what}" for what, count in counts.items() if count))
        for tenant in dict.fromkeys(version["tenant"] for version, _ in versions if version.get("tenant_created")):
            tell_new_tenant(tenant)
    for outcome, error in failed:
        complain(f"{outcome.folder}: {error_line(error)}")
    if failed:
        raise typer.Exit(1)
