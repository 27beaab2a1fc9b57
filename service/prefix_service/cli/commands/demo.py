"""`demo`: see it work."""

import sys
from typing import Annotated

import typer

from prefix_service.cli.console import console
from prefix_service.cli.options import Json


def register(app: typer.Typer) -> None:
    """Add this command to the command line."""
    app.command()(demo)


def demo(
    stay: Annotated[bool, typer.Option("--stay", help="Leave the service running until Ctrl+C.")] = False,
    as_json: Json = False,
) -> None:
    """See it work: a service, real adapters, a language model.

    Starts a service of its own, publishes adapters, fetches them as a worker would, and lets a language model speak
    with and without them; then compiles a soft prompt and a document into prefixes.
    """
    from prefix_service.cli.demo.demo import run_demo

    if not run_demo(console, stay=stay, as_json=as_json):
        sys.exit(1)
