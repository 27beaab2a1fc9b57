"""The commands of `prefix-service`, put together."""

import sys
from importlib.metadata import version
from typing import Annotated

import typer

from prefix_service.cli.commands import alias, demo, residency, serve, tenant, usage, worker
from prefix_service.cli.console import complain
from prefix_service.errors import PrefixServiceError

app = typer.Typer(
    name="prefix-service",
    help="Host trained prefix-tuning adapters and hand their past_key_values to inference workers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
serve.register(app)
worker.register(app)
alias.register(app)
tenant.register(app)
residency.register(app)
usage.register(app)
demo.register(app)


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
    """Run; an error is one sentence on standard error and exit status 1, wrong usage is status 2."""
    try:
        app()
    except PrefixServiceError as error:
        complain(f"error ({error.code}): {error}")
        sys.exit(1)
