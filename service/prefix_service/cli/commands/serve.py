"""`serve`, `backup` and `openapi`: the commands of who runs the service."""

import gc
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prefix_service.cli.console import errors_console, print_json, say
from prefix_service.cli.files import check_output, written
from prefix_service.cli.options import Json
from prefix_service.errors import InvalidInput
from prefix_service.system.sizes import human_bytes

if TYPE_CHECKING:
    from prefix_service.settings import Settings


def _setting(name: str, default: str | None, text: str) -> Any:
    """Returns an option that takes the place of a setting, which `Settings` reads; its help names the variable."""
    variable = f"env var: PREFIX_{name.upper()}"
    shown = variable if default is None else f"{variable}; default: {default}"
    return typer.Option(f"--{name.replace('_', '-')}", help=f"{text}  [{shown}]")


DataDir = Annotated[Path | None, _setting("data_dir", "data", "Data folder.")]


def register(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    app.command()(serve)
    app.command()(backup)
    app.command()(openapi)


def serve(
    host: Annotated[str | None, _setting("host", "127.0.0.1", "Address to listen on.")] = None,
    port: Annotated[int | None, _setting("port", "8080", "Port to listen on.")] = None,
    uds: Annotated[Path | None, _setting("uds", None, "Unix socket to listen on instead.")] = None,
    data_dir: DataDir = None,
    device: Annotated[str | None, _setting("device", "auto", "auto, cpu, cuda or cuda:1.")] = None,
    workers: Annotated[int | None, _setting("workers", "1", "Processes on the data folder.")] = None,
    dev: Annotated[bool | None, _setting("dev", None, "No keys, on loopback only.")] = None,
    read_only: Annotated[bool | None, _setting("read_only", None, "Serve what is there, change nothing.")] = None,
    as_json: Json = False,
) -> None:
    """Run the service.

    Every option is also an environment variable; settings that have no option come from the environment alone. --json
    logs JSON on a terminal too, and prints where the service listens, once it does.
    """
    chosen = {"host": host, "port": port, "uds": uds, "data_dir": data_dir}
    chosen |= {"device": device, "workers": workers, "dev": dev, "read_only": read_only}
    # What is imported stays: to look through it for garbage would make the start longer.
    gc.disable()
    settings = load_settings(chosen)
    from prefix_service.api.processes.run import run

    gc.enable()
    run(settings, as_json=as_json)


def load_settings(chosen: dict[str, Any]) -> "Settings":
    """The settings of the environment, with what was `chosen` on the command line on top.

    Raises:
        InvalidInput: a value is out of bounds.
    """
    from pydantic import ValidationError

    from prefix_service.settings import Settings, is_secret

    # As environment variables, so that worker processes read the same.
    for name, value in chosen.items():
        if value is not None:
            os.environ[f"PREFIX_{name.upper()}"] = str(value)
    try:
        return Settings()
    except ValidationError as error:
        first = error.errors()[0]
        reason = first["msg"].removeprefix("Value error, ")
        if not first["loc"]:
            raise InvalidInput(reason) from error
        name = str(first["loc"][0])
        got = "" if is_secret(name) else f", got {first['input']!r}"
        raise InvalidInput(f"PREFIX_{name.upper()}: {reason}{got}") from error


def backup(
    target: Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder that does not exist yet.")],
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Copy a data folder, also of a running service. The copy is a data folder for `serve --data-dir`."""
    from rich.progress import DownloadColumn, Progress, SpinnerColumn, TransferSpeedColumn

    from prefix_service.data_folder.backup import back_up

    settings = load_settings({"data_dir": data_dir})
    columns = (SpinnerColumn(), "copying", DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=errors_console, transient=True) as progress:
        task = progress.add_task("", total=None)
        done = back_up(settings, target, lambda nbytes: progress.advance(task, nbytes))
    if as_json:
        print_json({"path": str(target), "blobs": done.blobs, "bytes": done.nbytes, "lost": done.lost})
    else:
        say(f"copied {done.blobs} blobs, {human_bytes(done.nbytes)}, to {target}")
        for digest in done.lost:
            say(f"lost or damaged: {digest}")
    if done.lost:
        raise typer.Exit(1)


def openapi(
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File to write; default: print.")] = None,
    as_json: Json = False,
) -> None:
    """Write the OpenAPI document of the service. It is JSON, with or without --json."""
    from prefix_service.api.app import create_app
    from prefix_service.settings import Settings

    if output is not None:
        check_output(output)
    text = json.dumps(create_app(Settings()).openapi(), indent=2, ensure_ascii=False) + "\n"
    if output is None:
        sys.stdout.write(text)
    else:
        with written(output) as aside:
            aside.write_text(text)
        if as_json:
            print_json({"path": str(output)})
