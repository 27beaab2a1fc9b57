"""A worker process: serves until its supervisor asks it to end, or is gone, and sends signs of life.

Signs come from the event loop, so that they stop if it does. torch is imported after the process is tied to its
supervisor.
"""

import asyncio
import contextlib
import ctypes
import os
import signal
import socket
import sys
from functools import partial
from multiprocessing.reduction import DupFd
from typing import Any, Final

from prefix_service.api.processes.supervisor import SIGN
from prefix_service.errors import PrefixServiceError
from prefix_service.logs import configure
from prefix_service.settings import Settings

FAILED: Final = 3
"""The exit status of a worker that could not start and has reported why."""

_EVERY: Final = 1.0  # seconds between two signs
_PR_SET_PDEATHSIG: Final = 1  # prctl(2)


class Inherited:
    """A file descriptor that a spawned process inherits, and keeps open until it ends."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __reduce__(self) -> tuple[Any, ...]:
        return _inherited, (DupFd(self.descriptor),)


def _inherited(duplicate: Any) -> Inherited:
    return Inherited(duplicate.detach())


def work(
    supervisor: socket.socket,
    started_by: int,
    settings: Settings,
    sockets: list[socket.socket],
    _lock: Inherited | None,
    as_json: bool = False,
) -> None:
    """Serves on `sockets` until a signal, or the end of the process `started_by`.

    Args:
        supervisor: receives signs of life; its other end closes with the supervisor.
        started_by: the supervisor's process id.
        settings: the service's settings.
        sockets: listening sockets, shared with the other workers.
        _lock: the data folder's lock, which thereby holds until the last worker has ended.
        as_json: whether to log JSON on a terminal too.
    """
    die_with(started_by)
    # Ctrl+C and the end of a terminal reach every process; the supervisor decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    configure(settings.log_level, as_json=as_json)
    try:
        _serve(supervisor, settings, sockets)
    except (PrefixServiceError, OSError) as error:
        with contextlib.suppress(OSError):
            supervisor.sendall(str(error).encode())
        sys.exit(FAILED)


def die_with(parent: int) -> None:
    """Ends this process when its parent ends, for whatever reason.

    On Linux the kernel kills it, even if it is stopped or its event loop hangs. A worker that only noticed the end of
    the pipe would finish its requests first: the folder would stay locked that long, and the next service, which
    systemd or Kubernetes starts immediately, would be refused. On other systems the end of the pipe must suffice.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent ended before the call to prctl
        sys.exit(FAILED)


def _serve(supervisor: socket.socket, settings: Settings, sockets: list[socket.socket]) -> None:
    from prefix_service.api.app import begin_end, create_app
    from prefix_service.api.metrics.metrics import Metrics
    from prefix_service.api.metrics.worker_metrics import take_place
    from prefix_service.api.server.serving import Server, end_in_order_on

    end_in_order_on(signal.SIGTERM)
    supervisor.setblocking(False)

    def begin() -> None:
        loop = asyncio.get_running_loop()
        loop.add_reader(supervisor, supervisor_ended, loop)
        give_sign(loop)

    def give_sign(loop: asyncio.AbstractEventLoop) -> None:
        with contextlib.suppress(OSError):  # the supervisor is stopped, and reads later
            supervisor.send(SIGN)
        loop.call_later(_EVERY, give_sign, loop)

    def supervisor_ended(loop: asyncio.AbstractEventLoop) -> None:
        loop.remove_reader(supervisor)
        server.should_exit = True

    app = create_app(settings, Metrics(take_place()))
    server = Server(settings, app, begin, partial(begin_end, app))
    server.run(sockets)
