"""Announces a service once it listens: a few lines for a person on a terminal, else one line in the log."""

import json
import shlex
import sys
from importlib.metadata import version

import structlog
import torch

from prefix_service.data_folder.opening import bootstrap_file, shown_catalog
from prefix_service.logs import for_people, write_line
from prefix_service.settings import Settings
from prefix_service.system.file_limit import most_connections
from prefix_service.system.printable import printable

log: structlog.stdlib.BoundLogger = structlog.stdlib.get_logger("prefix_service")


def announce(settings: Settings, at: str, device: torch.device, *, as_json: bool = False) -> None:
    """Say that the service listens `at` an address, on which device prefixes are kept, and where the first key is: on
    standard error, and with `as_json` as a JSON document on standard output too."""
    key = bootstrap_file(settings.data_dir)
    if as_json:
        key_file = str(key) if key.exists() and not settings.dev else None
        where = {"at": at, "data_dir": str(settings.data_dir), "device": str(device), "key_file": key_file}
        found = {"version": version("prefix-service"), **where}
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
        sys.stdout.flush()
    if for_people():
        rows = _rows(settings, at, device)
        lines = [f"prefix-service {version('prefix-service')} is ready", *(f"  {name:8}{text}" for name, text in rows)]
        write_line("\n".join(map(printable, lines)))
        return
    log.info(
        "serving",
        version=version("prefix-service"),
        at=at,
        data=str(settings.data_dir),
        **_catalog(settings),
        device=str(device),
        connections=most_connections(settings.max_connections),
    )
    if settings.dev:
        log.warning("dev mode: no keys, every caller on this machine may do everything")
    elif key.exists():
        log.info("the platform admin's first key is in a file", file=str(key))


def _catalog(settings: Settings) -> dict[str, str]:
    found = shown_catalog(settings)
    return {} if found is None else {"catalog": found}


def _rows(settings: Settings, at: str, device: torch.device) -> list[tuple[str, str]]:
    """Returns what a person needs next, as pairs of a label and a text."""
    here = at.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")
    rows = [("where", here if here == at else f"{here}, and every other address of this machine")]
    if settings.uds is None:
        rows.append(("docs", f"{here}/docs"))
    key = bootstrap_file(settings.data_dir)
    if settings.dev:
        rows.append(("key", "none is needed: every caller on this machine may do everything (--dev)"))
    elif key.exists():
        rows.append(("key", f"export PREFIX_API_KEY=$(cat {shlex.quote(str(key))})"))
    else:
        rows.append(("key", "prefix-service key create makes one"))
    rows.append(("data", f"{settings.data_dir}, prefixes on {device}{', read-only' if settings.read_only else ''}"))
    rows += _catalog(settings).items()
    return [*rows, ("stop", "Ctrl+C")]
