"""`doctor`: what keeps this machine from working with its service, and what to do about it."""

import contextlib
import os
import platform
import stat
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import typer

from prefix_service.cli.commands.serve import load_settings
from prefix_service.cli.console import print_json, print_table, say, working
from prefix_service.cli.folder_checks import Check, folder_checks
from prefix_service.cli.options import DEFAULT_URL, MAKE_A_KEY, ApiKey, Json, Url, address, chosen_socket, connect
from prefix_service.errors import (
    ConnectionFailed,
    InvalidInput,
    InvalidResponse,
    NotFound,
    PrefixServiceError,
    Unauthenticated,
)
from prefix_service.system.sizes import human_bytes

_CLOCK: Final = 30.0  # seconds that two clocks may differ
_SOON: Final = timedelta(days=7)
_PACKAGES: Final = ("torch", "safetensors", "transformers", "vllm")


def register(app: typer.Typer) -> None:
    """Add this command to the command line."""
    app.command()(doctor)


def doctor(url: Url = DEFAULT_URL, api_key: ApiKey = None, as_json: Json = False) -> None:
    """Find what is wrong here or with the service, and what to do.

    Checks versions, settings, the service's address, the key, the clock, the disk, permissions and the device, also
    while the service is away. Exit status 1 if a check failed; a warning is none.
    """
    with working("looking"):
        here = folder_checks(Path(os.environ.get("PREFIX_DATA_DIR", "data")), os.geteuid(), _catalog_url())
        checks = [*_of_service(url, api_key), _settings(), *here, _device()]
    has_failed = any(check.state == "failed" for check in checks)
    if as_json:
        print_json({"ok": not has_failed, "checks": [asdict(check) for check in checks]})
    else:
        print_table("prefix-service doctor", ["check", "state", "found"], [[c.name, c.state, c.found] for c in checks])
        advice = [f"{check.name}: {check.advice}" for check in checks if check.advice]
        say()
        for line in [f"What to do, {len(advice)} in all:", *advice] if advice else ["Everything is in order."]:
            say(line)
    if has_failed:
        raise typer.Exit(1)


def _of_service(url: str, api_key: str | None) -> Iterator[Check]:
    """The checks that ask the service; those that it must answer are left out where it does not."""
    began = time.perf_counter()
    try:
        with connect(url, api_key, shows_progress=True) as client:
            took = (time.perf_counter() - began) * 1000
            service, now = client.service(), datetime.now(UTC)
            yield _versions(service.version)
            yield Check("service", "ok", f"{address(url)} is ready, and answered in {took:.0f} ms")
            try:
                yield _key(client.whoami(), has_key=api_key is not None)
            except PrefixServiceError as error:
                yield _no_key(error, api_key)
            yield _clock(service.time, now)
    except PrefixServiceError as error:
        yield _versions(None)
        yield Check("service", "failed", str(error), _closed_socket() or _what_to_do(error))


def _closed_socket() -> str | None:
    """Returns what to do about a Unix socket that this user may not use; None if it is none or he may."""
    socket = chosen_socket()
    try:
        if socket is None or os.access(socket, os.W_OK):
            return None
        found = socket.stat()
    except OSError:
        return None
    mode = stat.S_IMODE(found.st_mode)
    return f"run it as user {found.st_uid} or in group {found.st_gid}: the socket has mode {mode:o}"


def _what_to_do(error: PrefixServiceError) -> str:
    if isinstance(error, ConnectionFailed):
        return "start the service with `prefix-service serve`, or name another with PREFIX_URL, --url or --uds"
    if isinstance(error, InvalidResponse):
        return "something else listens there: correct PREFIX_URL or --url"
    if isinstance(error, InvalidInput):
        return "correct PREFIX_URL, PREFIX_API_KEY or the options"
    return "the service runs and cannot work now: its log says why"


def _versions(of_service: str | None) -> Check:
    mine = version("prefix-service")
    found = [f"prefix-service {mine}", f"Python {platform.python_version()}", *_installed()]
    if of_service is None:
        return Check("versions", "ok", ", ".join(found))
    found.insert(1, f"the service {of_service}")
    if mine.split(".")[:2] == of_service.split(".")[:2]:
        return Check("versions", "ok", ", ".join(found))
    return Check(
        "versions", "warning", ", ".join(found), "update the older one: releases this far apart are not tested"
    )


def _installed() -> Iterator[str]:
    for package in _PACKAGES:
        try:
            yield f"{package} {version(package)}"
        except PackageNotFoundError:
            continue


def _key(key: Mapping[str, Any], *, has_key: bool) -> Check:
    if not has_key:
        return Check("key", "ok", "none is set, and this service needs none")
    whose = "the platform" if key.get("tenant") is None else f"tenant {key['tenant']}"
    found = f"{key.get('id')} of {whose}, scope {key.get('scope')}"
    if not isinstance(expires := key.get("expires"), str):
        return Check("key", "ok", f"{found}, without an end")
    left = datetime.fromisoformat(expires.replace("Z", "+00:00")).replace(tzinfo=UTC) - datetime.now(UTC)
    found = f"{found}, ends in {left.days} days"
    if left < _SOON:
        return Check("key", "warning", found, "make its successor now: `prefix-service key rotate`")
    return Check("key", "ok", found)


def _no_key(error: PrefixServiceError, api_key: str | None) -> Check:
    if isinstance(error, NotFound):
        return Check("key", "warning", "not checked: this service does not say whose key it is", "update the service")
    if isinstance(error, Unauthenticated):
        return Check("key", "failed", "none is set" if api_key is None else f"refused: {error}", MAKE_A_KEY)
    return Check("key", "failed", str(error), _what_to_do(error))


def _clock(of_service: datetime | None, now: datetime) -> Check:
    """Compare this machine's clock with that of the service."""
    if of_service is None:
        return Check("clock", "warning", "not checked: the service sent no date")
    ahead = (now - of_service).total_seconds()
    if abs(ahead) <= _CLOCK:
        return Check("clock", "ok", f"within {max(1, round(abs(ahead)))} s of the service's")
    where = "ahead of" if ahead > 0 else "behind"
    advice = "set both clocks (NTP): the ends of keys and of certificates depend on them"
    return Check("clock", "warning", f"{abs(ahead):.0f} s {where} the service's", advice)


def _settings() -> Check:
    """The settings that `serve` would take here."""
    try:
        load_settings({})
    except ModuleNotFoundError:
        return Check("settings", "ok", "not checked: the extra `server`, which runs a service, is not installed")
    except InvalidInput as error:
        return Check("settings", "failed", str(error), "correct or unset that variable")
    given = sorted(name for name in os.environ if name.startswith("PREFIX_"))
    return Check("settings", "ok", ", ".join(given) or "no PREFIX_… variable is set")


def _catalog_url() -> str | None:
    """Returns the URL of the catalog that `serve` would take here; None without one, or if the settings are wrong."""
    if "PREFIX_CATALOG_URL" not in os.environ:
        return None
    with contextlib.suppress(ModuleNotFoundError, InvalidInput):
        url = load_settings({}).catalog_url
        return None if url is None else url.get_secret_value()
    return None


def _device() -> Check:
    import torch

    wanted = os.environ.get("PREFIX_DEVICE", "auto")
    if wanted not in ("auto", "cpu"):
        try:
            torch.zeros(1, device=wanted)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).partition("\n")[0]
            return Check("device", "failed", f"PREFIX_DEVICE={wanted}: {reason}", "set PREFIX_DEVICE=auto")
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        name = torch.cuda.get_device_name()
        return Check("device", "ok", f"{name}, {human_bytes(free)} of {human_bytes(total)} free")
    if sys.platform == "linux" and Path("/proc/driver/nvidia/version").exists():
        found = f"there is an NVIDIA GPU, and PyTorch {torch.__version__} cannot use it"
        return Check("device", "warning", found, "install the CUDA build of PyTorch, or a newer driver")
    return Check("device", "ok", "cpu")
