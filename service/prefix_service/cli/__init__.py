"""`prefix-service`: the one entry point; each command imports its side only when it runs."""

import sys
from typing import Final

_OF_SERVER: Final = frozenset(
    {
        *("alembic", "anyio", "fastapi", "limits", "orjson", "prometheus_client", "pydantic_settings", "rfc8785"),
        *("sqlalchemy", "starlette", "structlog", "uvicorn"),
    }
)
"""What the extra `server` brings."""


def main() -> None:
    """Run the command line; where a command needs the extra `server`, say so."""
    from prefix_service.cli.app import run

    try:
        run()
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in _OF_SERVER:
            raise
        sys.exit("this command runs a service or works on its folder: pip install 'prefix-service[server]'")
