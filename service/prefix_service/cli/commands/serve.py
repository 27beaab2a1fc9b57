"""`serve`, `key`, `backup` and `openapi`: the commands of who runs the service."""

import contextlib
import gc
import json
import os
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from prefix_service.cli.console import errors_console, human_bytes, print_json, print_table, say
from prefix_service.cli.files import check_output, written
from prefix_service.cli.options import Json
from prefix_service.errors import InvalidInput, InvalidRequest
from prefix_service.prefix.references import check_name

if TYPE_CHECKING:
    from prefix_service.catalog.keys import Keyring
    from prefix_service.catalog.records import Key
    from prefix_service.catalog.tenants import Tenants
    from prefix_service.settings import Settings

key_app = typer.Typer(help="Make, list and revoke keys in a data folder, also while no service runs.")


def _setting(name: str, default: str | None, text: str) -> Any:
    """Returns an option that takes the place of a setting, which `Settings` reads; its help names the variable."""
    variable = f"env var: PREFIX_{name.upper()}"
    shown = variable if default is None else f"{variable}; default: {default}"
    return typer.Option(f"--{name.replace('_', '-')}", help=f"{text}  [{shown}]")


DataDir = Annotated[Path | None, _setting("data_dir", "data", "Data folder.")]
Platform = Annotated[bool, typer.Option("--platform", help="A key of the platform, for all tenants.")]
TenantOption = Annotated[str | None, typer.Option("--tenant", help="The tenant that the key belongs to.")]


def register(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    app.command()(serve)
    app.command()(backup)
    app.command()(openapi)
    app.add_typer(key_app, name="key", no_args_is_help=True)


def serve(
    host: Annotated[str | None, _setting("host", "127.0.0.1", "Address to listen on.")] = None,
    port: Annotated[int | None, _setting("port", "8080", "Port to listen on.")] = None,
    uds: Annotated[Path | None, _setting("uds", None, "Unix socket to listen on instead.")] = None,
    data_dir: DataDir = None,
    device: Annotated[str | None, _setting("device", "auto", "auto, cpu, cuda or cuda:1.")] = None,
    workers: Annotated[int | None, _setting("workers", "1", "Processes on the data folder.")] = None,
    dev: Annotated[bool | None, _setting("dev", None, "No keys, on loopback only.")] = None,
    read_only: Annotated[bool | None, _setting("read_only", None, "Serve what is there, change nothing.")] = None,
) -> None:
    """Run the service. The README lists the settings that have no option; they come from the environment."""
    chosen = {"host": host, "port": port, "uds": uds, "data_dir": data_dir}
    chosen |= {"device": device, "workers": workers, "dev": dev, "read_only": read_only}
    # What is imported stays: no collection, at the start or later, needs to look through it for garbage.
    gc.disable()
    settings = load_settings(chosen)
    from prefix_service.api.processes.run import run

    gc.freeze()
    gc.enable()
    run(settings)


def load_settings(chosen: dict[str, Any]) -> "Settings":
    """The settings of the environment, with what was `chosen` on the command line on top.

    Raises:
        InvalidInput: a value is out of bounds.
    """
    from pydantic import ValidationError

    from prefix_service.settings import Settings

    # As environment variables, so that worker processes read the same.
    for name, value in chosen.items():
        if value is not None:
            os.environ[f"PREFIX_{name.upper()}"] = str(value)
    try:
        return Settings()
    except ValidationError as error:
        first = error.errors()[0]
        reason = first["msg"].removeprefix("Value error, ")
        where = f"PREFIX_{str(first['loc'][0]).upper()}: {reason}, got {first['input']!r}" if first["loc"] else reason
        raise InvalidInput(where) from error


def _owner(tenant: str | None, platform: bool) -> str | None:
    if platform == (tenant is not None):
        raise InvalidRequest("say whose key it is: --platform, or --tenant and a name")
    return None if tenant is None else check_name("tenant", tenant)


@contextlib.contextmanager
def _keyring(data_dir: Path | None) -> "Iterator[tuple[Keyring, Tenants]]":
    from prefix_service.data_folder.opening import keys_of

    with keys_of(load_settings({"data_dir": data_dir})) as found:
        yield found


def _shown(key: "Key") -> dict[str, Any]:
    from prefix_service.api.routes.schemas import KeyItem

    return KeyItem.model_validate(key, from_attributes=True).model_dump(mode="json")


@key_app.command("create")
def create_key(
    scope: Annotated[Literal["read", "write", "admin"], typer.Option(help="What the key may do.")],
    tenant: TenantOption = None,
    platform: Platform = False,
    name: Annotated[str, typer.Option(help="A note, shown in listings.")] = "",
    expires: Annotated[datetime | None, typer.Option(help="When it ends, UTC.")] = None,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Make a key and print it once; a tenant that does not exist yet is made."""
    from prefix_service.catalog.records import COMMAND_LINE

    owner = _owner(tenant, platform)
    with _keyring(data_dir) as (keyring, tenants):
        if owner is not None:
            tenants.put(owner, COMMAND_LINE)
        key, text = keyring.create(owner, scope, name, COMMAND_LINE, expires)
    if as_json:
        print_json({**_shown(key), "key": text})
    else:
        sys.stdout.write(text + "\n")


@key_app.command("list")
def list_keys(
    tenant: TenantOption = None, platform: Platform = False, data_dir: DataDir = None, as_json: Json = False
) -> None:
    """Show the keys of a tenant or of the platform, without their secrets."""
    owner = _owner(tenant, platform)
    with _keyring(data_dir) as (keyring, _):
        found = [_shown(key) for key in keyring.listed(owner)]
    if as_json:
        print_json({"items": found})
    else:
        columns = ["id", "scope", "name", "created", "expires", "last_used"]
        rows = [[key[column] for column in columns] for key in found]
        print_table(f"Keys of {owner or 'the platform'}", columns, rows)


@key_app.command("revoke")
def revoke_key(
    key_id: Annotated[str, typer.Argument(help="The id that `key list` shows.")],
    tenant: TenantOption = None,
    platform: Platform = False,
    data_dir: DataDir = None,
) -> None:
    """Revoke a key: running services refuse it within seconds."""
    from prefix_service.catalog.records import COMMAND_LINE

    owner = _owner(tenant, platform)
    with _keyring(data_dir) as (keyring, _):
        keyring.revoke(owner, key_id, COMMAND_LINE)


def backup(
    target: Annotated[Path, typer.Argument(help="A folder that does not exist yet.")],
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Copy a data folder, also while the service runs: the copy is a data folder for `serve --data-dir`."""
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
) -> None:
    """Write the OpenAPI document of the service."""
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
