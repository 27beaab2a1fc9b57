"""What commands on a service share: options, the client, and a question before what cannot be undone."""

import sys
from typing import TYPE_CHECKING, Annotated, Final

import typer
from rich.prompt import Confirm
from rich.text import Text

from prefix_service.cli.completion import complete_adapter
from prefix_service.cli.console import errors_console
from prefix_service.errors import InvalidRequest
from prefix_service.system.printable import printable

if TYPE_CHECKING:
    from prefix_service.client import PrefixClient

DEFAULT_URL: Final = "http://127.0.0.1:8080"
_PATIENCE: Final = 5.0  # seconds

Url = Annotated[str, typer.Option("--url", envvar="PREFIX_URL", help="Where the service is.")]
ApiKey = Annotated[
    str | None,
    typer.Option("--api-key", envvar="PREFIX_API_KEY", help="The key; better in the environment.", show_envvar=True),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
Ref = Annotated[
    str,
    typer.Argument(
        metavar="TENANT/ADAPTER[@…]",
        help="An adapter; @7, @alias or @sha256:… names a version.",
        autocompletion=complete_adapter,
    ),
]
AdapterName = Annotated[
    str, typer.Argument(metavar="TENANT/ADAPTER", help="The adapter.", autocompletion=complete_adapter)
]


def connect(url: str, api_key: str | None) -> "PrefixClient":
    """A client of the service.

    Raises:
        ConnectionFailed, Unavailable: it is not there; said within seconds, for a person waits.
    """
    from prefix_service.client import PrefixClient

    with PrefixClient(url, timeout=_PATIENCE) as probe:
        probe.is_ready()
    return PrefixClient(url, api_key)


def confirm(deletion: str, *, yes: bool) -> None:
    """Ask whether to do it, unless that was said.

    Raises:
        InvalidRequest: nobody is there to ask.
        typer.Abort: the answer is no.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise InvalidRequest(f"to {deletion} needs a yes: answer on a terminal, or add --yes")
    if not Confirm.ask(Text(printable(f"{deletion}?")), console=errors_console, default=False):
        raise typer.Abort
