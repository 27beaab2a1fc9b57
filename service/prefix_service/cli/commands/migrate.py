"""`migrate`: from a data folder to a fleet while the service runs, and back."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from prefix_service.cli.commands.serve import DataDir, load_settings
from prefix_service.cli.console import errors_console, note, print_json, say
from prefix_service.cli.options import Json
from prefix_service.errors import InvalidInput
from prefix_service.system.sizes import human_bytes

if TYPE_CHECKING:
    from prefix_service.settings import Settings

_OPTIONS: Final = {"catalog_url": "--to-catalog", "blobs_url": "--to-blobs"}


def register(app: typer.Typer) -> None:
    """Add this command to the command line."""
    app.command()(migrate)


def migrate(
    to_catalog: Annotated[str | None, typer.Option(metavar="URL", help="PostgreSQL database to fill.")] = None,
    to_blobs: Annotated[str | None, typer.Option(metavar="URL", help="s3://bucket/path to fill.")] = None,
    to_data_dir: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Data folder for what has no URL above.")
    ] = None,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Copy a service to PostgreSQL and a bucket, or back to a folder.

    What is copied is the service of the settings (PREFIX_DATA_DIR, PREFIX_CATALOG_URL, PREFIX_BLOBS_URL). It may run,
    and is not changed. Run it again to copy what changed since. Exit status 1 if a blob was lost or damaged.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

    from prefix_service.data_folder.moving import move

    source = load_settings({"data_dir": data_dir})
    target = target_of(source, to_catalog, to_blobs, to_data_dir)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=errors_console, transient=True) as progress:
        task = progress.add_task("looking", total=None)
        done = move(
            source,
            target,
            lambda what, at, total: progress.update(task, description=what, completed=at, total=total),
        )
    if as_json:
        rows = {"added": done.rows.added, "changed": done.rows.changed, "removed": done.rows.removed}
        copied = {"blobs": done.blobs, "bytes": done.nbytes, "rows": rows}
        print_json({"catalog": done.catalog, "revision": done.revision, **copied, "lost": done.lost})
    else:
        say(
            f"copied {done.blobs} blobs, {human_bytes(done.nbytes)}; rows: {done.rows.added} added, "
            f"{done.rows.changed} changed, {done.rows.removed} removed; revision {done.revision}"
        )
        for digest in done.lost:
            say(f"lost or damaged: {digest}")
    if to_catalog is not None:
        note(f"every replica needs a copy of {source.secret_file}, which PREFIX_KEY_SECRET_FILE names")
    if done.lost:
        raise typer.Exit(1)


def target_of(source: "Settings", catalog: str | None, blobs: str | None, folder: Path | None) -> "Settings":
    """Returns the settings of a service on the target: two URLs, or a data folder for what has none.

    Raises:
        InvalidInput: a URL is malformed, or it is not said where the catalog or the blobs go.
    """
    from pydantic import ValidationError

    from prefix_service.settings import Settings

    urls = {"catalog_url": catalog, "blobs_url": blobs}
    missing = [_OPTIONS[name] for name, url in urls.items() if url is None]
    if missing and folder is None:
        raise InvalidInput(f"say where to copy to: {' and '.join(missing)}, or --to-data-dir for a data folder")
    if not missing and folder is not None:
        raise InvalidInput("with --to-catalog and --to-blobs nothing goes to a folder: leave --to-data-dir out")
    chosen: dict[str, Any] = {**urls, "data_dir": folder or source.data_dir, "read_only": False}
    chosen["key_secret_file"] = None if urls["catalog_url"] is None else source.secret_file
    try:
        return Settings(**chosen)
    except ValidationError as error:
        first = error.errors()[0]
        reason = first["msg"].removeprefix("Value error, ")
        raise InvalidInput(f"{_OPTIONS[str(first['loc'][0])]}: {reason}") from error
