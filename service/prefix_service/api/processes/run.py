"""Runs a service: a data folder, served by one process or by several."""

import contextlib
import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import structlog
from prometheus_client import CollectorRegistry, start_http_server

from prefix_service.api.app import begin_end, create_app
from prefix_service.api.metrics.metrics import Metrics
from prefix_service.api.metrics.worker_metrics import shared_folder, whole_service
from prefix_service.api.processes.announcement import announce
from prefix_service.api.processes.supervisor import Supervisor
from prefix_service.api.processes.worker import Inherited, work
from prefix_service.api.server.listening import address, listening
from prefix_service.api.server.serving import Server, end_in_order_on
from prefix_service.data_folder.opening import opened
from prefix_service.errors import Conflict, InvalidInput
from prefix_service.library.shared_files import sweep
from prefix_service.logs import configure, finish
from prefix_service.registry.registry import choose_device
from prefix_service.settings import Settings, unknown_variables
from prefix_service.system.file_limit import raise_file_limit

log: structlog.stdlib.BoundLogger = structlog.stdlib.get_logger("prefix_service")


def run(settings: Settings, *, as_json: bool = False) -> None:
    """Serve until a signal ends it; requests under way are finished first. `as_json` logs JSON on a terminal too.

    Raises:
        Conflict: another service runs on the data folder, or another program listens on the address or metrics port.
        InvalidInput: the machine lacks the device, or the address or the folder for shared files cannot be used.
        StorageFailed, OutOfSpace: the disk refused.
        Unavailable: no worker process could start.
    """
    configure(settings.log_level, as_json=as_json)
    try:
        _serve(settings, as_json=as_json)
    finally:
        finish()


def _serve(settings: Settings, *, as_json: bool) -> None:
    _warn_of_unknown_variables()
    raise_file_limit()
    device = choose_device(settings.device)
    if settings.shared_dir is not None:
        _check_shared(settings.shared_dir, settings.uds)
    end_in_order_on(signal.SIGTERM, signal.SIGINT)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # it is under nohup
        # The terminal closes: the same as SIGTERM, which uvicorn knows.
        signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))
    with opened(settings) as lock, listening(settings) as sockets:
        on_ready = partial(announce, settings, address(sockets), device, as_json=as_json)
        if settings.workers == 1:
            metrics = Metrics()
            with _metrics_port(settings, metrics.exposed):
                app = create_app(settings, metrics)
                Server(settings, app, on_ready, partial(begin_end, app)).run(sockets)
        else:
            inherited = None if lock is None else Inherited(lock)
            with shared_folder() as folder, _metrics_port(settings, whole_service(folder)):
                Supervisor(settings.workers, work, (settings, sockets, inherited, as_json), on_ready).run()


def _warn_of_unknown_variables() -> None:
    for name, meant in unknown_variables(os.environ.items()):
        hint = "no setting has this name, so it changes nothing" + (f": did you mean {meant}?" if meant else "")
        log.warning(hint, variable=name)


def _check_shared(shared_dir: Path, uds: Path | None) -> None:
    """Checks the folder for shared files before any process starts, so that the error is a plain message.

    Raises:
        InvalidInput: the service does not listen on a Unix socket, or others can replace the folder or its contents.
        StorageFailed, OutOfSpace: the system refused.
    """
    if uds is None:
        raise InvalidInput(f"files in {shared_dir} are for workers on a Unix socket: set PREFIX_UDS or --uds too")
    sweep(shared_dir)


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
