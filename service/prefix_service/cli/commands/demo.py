"""`demo`: see it work."""

import sys
from typing import Annotated

import typer

from prefix_service.cli.console import console


def register(app: typer.Typer) -> None:
    """Add this command to the command line."""
    app.command()(demo)


def demo(
    stay: Annotated[bool, typer.Option("--stay", help="Leave the service running until Ctrl+C.")] = False,
) -> None:
    """Start a service, publish real adapters, fetch them, and let a language model speak with and without them."""
    from prefix_service.cli.demo.demo import run_demo

    if not run_demo(console, stay=stay):
        sys.exit(1)
