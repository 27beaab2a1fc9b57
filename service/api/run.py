"""A running service: uvicorn on a data folder, in one process or several."""

import signal
import sys
from collections.abc import Callable
from importlib.metadata import version
from types import FrameType
from typing import NoReturn

import uvicorn

from service.api.app import create_app
from service.data_folder import bootstrap_file, opened
from service.registry.registry import choose_device
from service.settings import LOOPBACK, Settings


def run(settings: Settings, announce: Callable[[str], None]) -> None:
    """Serve until a signal ends it; requests under way are finished first.

    Raises:
        Conflict: another service runs on the data folder.
        InvalidInput: the device is not there.
        StorageFailed, OutOfSpace: the disk refused.
    """
    device = choose_device(settings.device)
    for number in (signal.SIGTERM, signal.SIGINT):
        # uvicorn raises the signal again after it has drained: an end in order is status 0.
        signal.signal(number, _end)
    with opened(settings):
        where = f"unix:{settings.uds}" if settings.uds else f"http://{settings.host}:{settings.port}"
        announce(f"prefix-service {version('prefix-service')} on {where}, data in {settings.data_dir}, device {device}")
        if settings.dev:
            announce("dev mode: no keys, every caller on this machine may do everything")
        elif bootstrap_file(settings.data_dir).exists():
            announce(f"the platform admin's first key is in {bootstrap_file(settings.data_dir)}")
        single = settings.workers == 1
        uvicorn.run(
            create_app(settings) if single else "service.api.app:create_app_from_environment",
            factory=not single,
            workers=settings.workers,
            host=settings.host,
            port=settings.port,
            uds=None if settings.uds is None else str(settings.uds),
            # httptools is the faster parser, and lets two Host headers and any number of others through.
            http="httptools" if settings.uds or settings.host in LOOPBACK else "h11",
            ws="none",
            access_log=False,
            server_header=False,
            log_level="warning",
            timeout_graceful_shutdown=30,
        )


def _end(_number: int, _frame: FrameType | None) -> NoReturn:
    sys.exit(0)
