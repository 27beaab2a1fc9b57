"""Shared by commands on a service: options, the client, and a question before what cannot be undone."""

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import fields, is_dataclass
from functools import wraps
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Final, get_type_hints

import typer
from rich.prompt import Confirm
from rich.text import Text

from prefix_service.cli.completion import complete_adapter
from prefix_service.cli.console import errors_console, waiting_for
from prefix_service.errors import InvalidRequest, Unauthenticated
from prefix_service.system.printable import printable

if TYPE_CHECKING:
    from prefix_service.client import PrefixClient

DEFAULT_URL: Final = "http://127.0.0.1:8080"
MAKE_A_KEY: Final = (
    "set PREFIX_API_KEY: `prefix-service key create` makes a key, and the first one is in the file bootstrap.key of "
    "the service's data folder"
)
_PATIENCE: Final = 5.0  # seconds

Url = Annotated[str, typer.Option("--url", envvar="PREFIX_URL", help="Where the service is.")]
ApiKey = Annotated[
    str | None,
    typer.Option("--api-key", envvar="PREFIX_API_KEY", help="The key; better in the environment.", show_envvar=True),
]
Uds = Annotated[Path | None, typer.Option("--uds", help="The Unix socket that the service listens on.")]
CaFile = Annotated[Path | None, typer.Option("--ca-file", help="Certificate authorities to trust, a PEM file.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, errors too.")]
Config = Annotated[
    Path | None,
    typer.Option(
        "--config", metavar="FILE", help="The adapter_config.json, where it is elsewhere.", exists=True, dir_okay=False
    ),
]
BaseConfig = Annotated[
    Path | None,
    typer.Option(
        "--base-config",
        metavar="FILE",
        help="The base model's config.json, for dimensions that are missing.",
        exists=True,
        dir_okay=False,
    ),
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
Ref = Annotated[
    str,
    typer.Argument(
        metavar="TENANT/ADAPTER[@…]",
        help="An adapter; @7, @alias or @sha256:… names a version.",
        autocompletion=complete_adapter,
    ),
]
BaseModelName = Annotated[
    str | None,
    typer.Option("--model", metavar="MODEL", help="The adapter's base model: a folder, or a name on Hugging Face."),
]
Device = Annotated[str, typer.Option("--device", metavar="DEVICE", help="Where the model computes: cpu, cuda, cuda:1.")]
AdapterName = Annotated[
    str, typer.Argument(metavar="TENANT/ADAPTER", help="The adapter.", autocompletion=complete_adapter)
]


_LEADING: Final = ("url", "api_key", "uds", "ca_file")
"""The parameters that lead to a service."""

_way: ContextVar[Mapping[str, Any]] = ContextVar("way", default=MappingProxyType({}))


def with_way(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command that takes --url the options --uds and --ca-file too; `connect` reads them."""
    options = {"uds": Uds, "ca_file": CaFile}

    @wraps(command)
    def call(**given: Any) -> Any:
        _way.set({name: given.pop(name) for name in options})
        return command(**given)

    signature = inspect.signature(command)
    more = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=option)
        for name, option in options.items()
    ]
    call.__signature__ = signature.replace(parameters=_as_shown([*signature.parameters.values(), *more]))  # type: ignore[attr-defined]
    return call


def unfolded(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command an option for each field of its parameters that are dataclasses, which keep what commands share in
    one place."""
    signature = inspect.signature(command, eval_str=True)
    shared: dict[str, Any] = {
        name: it.annotation for name, it in signature.parameters.items() if is_dataclass(it.annotation)
    }

    @wraps(command)
    def call(**given: Any) -> Any:
        made = {
            name: kind(**{field.name: given.pop(field.name) for field in fields(kind)}) for name, kind in shared.items()
        }
        return command(**given, **made)

    own = [it for name, it in signature.parameters.items() if name not in shared]
    more = [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=annotations[field.name]
        )
        for annotations, kind in ((get_type_hints(kind, include_extras=True), kind) for kind in shared.values())
        for field in fields(kind)
    ]
    call.__signature__ = signature.replace(parameters=_as_shown([*own, *more]))  # type: ignore[attr-defined]
    return call


def _as_shown(parameters: list[inspect.Parameter]) -> list[inspect.Parameter]:
    """Returns parameters as a help shows them: what a command does, then what leads to a service, then --json."""
    keyword = [it.replace(kind=inspect.Parameter.KEYWORD_ONLY) for it in parameters]
    return sorted(keyword, key=lambda it: (it.name == "as_json", it.name in _LEADING))


def chosen_socket() -> Path | None:
    """Returns the Unix socket that the command was given."""
    socket: Path | None = _way.get().get("uds")
    return socket


def address(url: str) -> str:
    """Returns the service's address for messages."""
    return url if (socket := chosen_socket()) is None else f"unix:{socket}"


@contextlib.contextmanager
def connect(
    url: str, api_key: str | None, *, shows_progress: bool = False, cache_bytes: int = 1 << 30
) -> "Iterator[PrefixClient]":
    """Yields a client of the service, by the socket and with the authorities that the command was given.

    If that, or the block, takes longer than two seconds, a line on the terminal says for whom the command waits. A
    block that `shows_progress` says itself what takes long.

    Raises:
        InvalidRequest: the authorities cannot be read.
        ConnectionFailed, Unavailable: it is not there; said within seconds, for a person waits.
        Unauthenticated: the block needs a key, and none was given.
    """
    from prefix_service.client import PrefixClient

    way = _way.get()
    with waiting_for(address(url)), PrefixClient(url, timeout=_PATIENCE, **way) as probe:
        probe.is_ready()
    said = contextlib.nullcontext() if shows_progress else waiting_for(address(url))
    with said, PrefixClient(url, api_key, cache_bytes=cache_bytes, **way) as client:
        try:
            yield client
        except Unauthenticated as error:
            if api_key:
                raise
            raise Unauthenticated(f"a key is needed: {MAKE_A_KEY}").met_by(error.request_id) from error


def own_tenant(client: "PrefixClient", tenant: str | None) -> str | None:
    """Returns the tenant that was named, or that of the key; None for a key of the platform."""
    if tenant is not None:
        return tenant
    own: str | None = client.whoami()["tenant"]
    return own


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
