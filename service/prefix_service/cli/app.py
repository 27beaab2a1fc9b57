"""The commands of `prefix-service`, put together."""

import inspect
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Annotated, Final

import typer

from prefix_service.cli.commands import (
    adapters,
    alias,
    bench,
    compiling,
    converting,
    demo,
    deploy,
    doctor,
    fetching,
    inspecting,
    key,
    migrate,
    publishing,
    residency,
    serve,
    tenant,
    usage,
)
from prefix_service.cli.console import complain, error_line, print_error
from prefix_service.cli.options import with_way
from prefix_service.errors import PrefixServiceError

app = typer.Typer(
    name="prefix-service",
    help="Host trained prefix-tuning adapters and hand their past_key_values to inference workers.",
    no_args_is_help=True,
    rich_markup_mode=None,  # Rich would take [default: 8080] for markup, and leave it out
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_WRONG_USAGE: Final = 2
OF_SERVER: Final = frozenset(
    {
        *("alembic", "anyio", "fastapi", "limits", "orjson", "prometheus_client", "pydantic_settings", "rfc8785"),
        *("sqlalchemy", "starlette", "structlog", "uvicorn"),
    }
)
"""What the extra `server` brings."""
_NEEDS_SERVER: Final = "this command runs a service or works on its folder: pip install 'prefix-service[server]'"

_NEEDS_COMPILE: Final = "this command runs the base model: pip install 'prefix-service[compile]'"
_OF_ADDRESSES: Final = {"huggingface_hub": "hf", "obstore": "s3", "oras": "oci", "requests": "oci"}
"""Modules that addresses of adapters need, and the schemes, which are the names of their extras too."""

_NEEDS: Final = {
    **dict.fromkeys(OF_SERVER, _NEEDS_SERVER),
    "transformers": _NEEDS_COMPILE,
    **{
        module: f"{scheme}:// addresses need more: pip install 'prefix-service[{scheme}]'"
        for module, scheme in _OF_ADDRESSES.items()
    },
}
"""Modules of extras, and what to install if one is missing."""

serve.register(app)
migrate.register(app)
publishing.register(app)
converting.register(app)
compiling.register(app)
fetching.register(app)
adapters.register(app)
inspecting.register(app)
alias.register(app)
tenant.register(app)
key.register(app)
residency.register(app)
doctor.register(app)
bench.register(app)
usage.register(app)
deploy.register(app)
demo.register(app)


def _lead_to_service(commands: typer.Typer) -> None:
    """Give every command that takes --url the other options that lead to a service."""
    for command in commands.registered_commands:
        if command.callback is not None and "url" in inspect.signature(command.callback).parameters:
            command.callback = with_way(command.callback)
    for group in commands.registered_groups:
        if group.typer_instance is not None:
            _lead_to_service(group.typer_instance)


_lead_to_service(app)


def _show_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"prefix-service {version('prefix-service')}\n")
        raise typer.Exit


@app.callback()
def options(
    _version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Options of every command."""


def run() -> None:
    """Run; an error is one sentence on standard error and exit status 1, wrong usage is status 2. With --json, standard
    output has the error too, as a JSON document."""
    wants_json = "--json" in sys.argv
    try:
        app(prog_name="prefix-service")
    except PrefixServiceError as error:
        complain(error_line(error))
        if wants_json:
            print_error(error.code, str(error), error.request_id)
        sys.exit(1)
    except ModuleNotFoundError as error:
        needs = _NEEDS.get((error.name or "").partition(".")[0])
        if needs is None:
            raise
        complain(f"error (extra-missing): {needs}")
        if wants_json:
            print_error("extra-missing", needs)
        sys.exit(1)
    except SystemExit as end:
        if wants_json and end.code == _WRONG_USAGE:
            print_error("wrong-usage", _reason(end))
        elif wants_json and isinstance(end.__context__, typer.Abort):
            print_error("aborted", "it was ended before it was done")
        raise


def _reason(end: SystemExit) -> str:
    """Returns why typer ended the process: it raises this while it handles an error of its own."""
    described: Callable[[], str] | None = getattr(end.__context__, "format_message", None)
    return "this is no command or option" if described is None else described()
