"""A running service: uvicorn on a data folder, in one process or several."""

import contextlib
import signal
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Final, NoReturn

import structlog
import uvicorn
from fastapi import FastAPI
from prometheus_client import CollectorRegistry, start_http_server

from service.api.app import create_app
from service.api.connections import KEEP_ALIVE
from service.api.metrics import Metrics
from service.api.protocols import connection_class
from service.api.worker_metrics import shared_folder, whole_service
from service.data_folder import bootstrap_file, opened
from service.errors import Conflict, InvalidInput
from service.file_limit import most_connections, raise_file_limit
from service.logs import configure
from service.registry.registry import choose_device
from service.settings import Settings
from service.shared_files import sweep

log: structlog.stdlib.BoundLogger = structlog.stdlib.get_logger("prefix_service")


_CONNECTIONS: Final = "service.api.protocols:connection_from_environment"


def run(settings: Settings) -> None:
    """Serve until a signal ends it; requests under way are finished first.

    Raises:
        Conflict: another service runs on the data folder, or another program listens on the metrics port.
        InvalidInput: the device is not there, or the folder for shared files cannot be used.
        StorageFailed, OutOfSpace: the disk refused.
    """
    configure(settings.log_level)
    raise_file_limit()
    device = choose_device(settings.device)
    if settings.shared_dir is not None:
        _check_shared(settings.shared_dir, settings.uds)
    for number in (signal.SIGTERM, signal.SIGINT):
        # uvicorn raises the signal again after it has drained: an end in order is status 0.
        signal.signal(number, _end)
    with opened(settings), _app(settings) as app:
        where = f"unix:{settings.uds}" if settings.uds else f"http://{settings.host}:{settings.port}"
        log.info(
            "serving",
            version=version("prefix-service"),
            at=where,
            data=str(settings.data_dir),
            device=str(device),
            connections=most_connections(settings.max_connections),
        )
        if settings.dev:
            log.warning("dev mode: no keys, every caller on this machine may do everything")
        elif bootstrap_file(settings.data_dir).exists():
            log.info("the platform admin's first key is in a file", file=str(bootstrap_file(settings.data_dir)))
        uvicorn.run(
            app,
            factory=isinstance(app, str),
            workers=settings.workers,
            host=settings.host,
            port=settings.port,
            uds=None if settings.uds is None else str(settings.uds),
            http=_CONNECTIONS if isinstance(app, str) else connection_class(settings),
            timeout_worker_healthcheck=60,  # a worker that imports torch beside others may be silent for long
            timeout_keep_alive=KEEP_ALIVE,
            ws="none",
            log_config=None,
            access_log=False,
            proxy_headers=False,  # nothing here asks who the caller was, or by which scheme he came
            server_header=False,
            timeout_graceful_shutdown=30,
        )


def _check_shared(shared_dir: Path, uds: Path | None) -> None:
    """What each process finds out too, here in words."""
    if uds is None:
        raise InvalidInput(f"files in {shared_dir} are for workers on a Unix socket: set PREFIX_UDS or --uds too")
    sweep(shared_dir)


@contextlib.contextmanager
def _app(settings: Settings) -> Iterator[FastAPI | str]:
    """The app, or for several workers where each finds it; its metrics on their port, if they have one."""
    if settings.workers == 1:
        metrics = Metrics()
        with _metrics_port(settings, metrics.exposed):
            yield create_app(settings, metrics)
    else:
        with shared_folder() as folder, _metrics_port(settings, whole_service(folder)):
            yield "service.api.app:create_app_from_environment"


@contextlib.contextmanager
def _metrics_port(settings: Settings, exposed: CollectorRegistry) -> Iterator[None]:
    if settings.metrics_port is None:
        yield
        return
    try:
        server, thread = start_http_server(settings.metrics_port, settings.host, exposed)
    except OSError as error:
        raise Conflict(f"metrics cannot be served on {settings.host}:{settings.metrics_port}: {error}") from error
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _end(_number: int, _frame: FrameType | None) -> NoReturn:
    sys.exit(0)
