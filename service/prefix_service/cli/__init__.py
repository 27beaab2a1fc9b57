"""`prefix-service`: the one entry point; each command imports its side only when it runs."""

import sys


def main() -> None:
    """Run the command line; without the extra `server` say what to install."""
    try:
        from prefix_service.cli.app import run
    except ModuleNotFoundError as error:
        if error.name not in {"typer", "rich"}:
            raise
        sys.exit("prefix-service needs its extra: pip install 'prefix-service[server]'")
    run()
