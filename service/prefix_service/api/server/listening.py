"""The sockets that a service listens on, bound once by the first process; workers inherit them."""

import contextlib
import errno
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from prefix_service.errors import Conflict, InvalidInput
from prefix_service.settings import Settings
from prefix_service.system.locks import locked

_BACKLOG: Final = 2048
_MODE: Final = 0o660  # the Unix socket's owner and group may connect
_NOT_HERE: Final = frozenset({errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT})


@contextlib.contextmanager
def listening(settings: Settings) -> Iterator[list[socket.socket]]:
    """Yields the listening sockets of these settings; closes them, and removes a Unix socket's file, at the block's
    end.

    Raises:
        Conflict: another program listens there.
        InvalidInput: it is impossible to listen on the address or the path.
    """
    with contextlib.ExitStack() as stack:
        if settings.uds is None:
            yield [stack.enter_context(each) for each in _tcp(settings.host, settings.port)]
        else:
            unix = stack.enter_context(_unix(settings.uds))
            mine = settings.uds.stat()
            try:
                yield [unix]
            finally:
                with contextlib.suppress(OSError):
                    if os.path.samestat(mine, settings.uds.stat()):
                        settings.uds.unlink()


def address(sockets: list[socket.socket]) -> str:
    """Returns the address of the first socket, as a URL or as `unix:` and a path."""
    name = sockets[0].getsockname()
    if isinstance(name, str):
        return f"unix:{name}"
    return f"http://[{name[0]}]:{name[1]}" if ":" in name[0] else f"http://{name[0]}:{name[1]}"


def _tcp(host: str, port: int) -> list[socket.socket]:
    """Returns one listening socket per address of the host that this machine has.

    Raises:
        Conflict: another program listens there.
        InvalidInput: it is impossible to listen on the address.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise InvalidInput(f"cannot listen on {host}: {error}") from error
    sockets: list[socket.socket] = []
    missing: OSError | None = None
    for family, _, _, _, where in dict.fromkeys(found):
        try:
            sockets.append(_bound(family, where))
        except OSError as error:
            if error.errno not in _NOT_HERE:
                for each in sockets:
                    each.close()
                raise _refused(f"{host}:{port}", error) from error
            missing = error
    if not sockets:
        raise _refused(f"{host}:{port}", missing or OSError("it has no address")) from missing
    return sockets


def _bound(family: socket.AddressFamily, where: object) -> socket.socket:
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        bound.bind(where)  # type: ignore[arg-type]
        bound.listen(_BACKLOG)
    except OSError:
        bound.close()
        raise
    return bound


def _unix(path: Path) -> socket.socket:
    """Returns a listening Unix socket; replaces a file that another service left behind, if nobody listens on it.

    Raises:
        Conflict: another program listens on the path, or it is not a socket.
        InvalidInput: it is impossible to listen on the path.
    """
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _alone_in(path.parent):
            _remove_stale(path)
            bound.bind(str(path))
            path.chmod(_MODE)  # before anyone can connect
            bound.listen(_BACKLOG)
    except OSError as error:
        bound.close()
        raise _refused(str(path), error) from error
    except Conflict:
        bound.close()
        raise
    return bound


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Locks a folder while one service examines a socket and replaces it, so that two services cannot both succeed."""
    with locked(folder, flags=os.O_RDONLY | os.O_DIRECTORY):
        yield


def _remove_stale(path: Path) -> None:
    try:
        is_socket = stat.S_ISSOCK(path.lstat().st_mode)
    except FileNotFoundError:
        return
    if not is_socket:
        raise Conflict(f"{path} exists and is not a socket: remove it, or choose another path for the Unix socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)  # if the backlog is full, a program listens
        if probe.connect_ex(str(path)) != errno.ECONNREFUSED:
            raise Conflict(f"another program listens on {path}: stop it first, or choose another path")
    path.unlink()


def _refused(where: str, error: OSError) -> Conflict | InvalidInput:
    if error.errno == errno.EADDRINUSE:
        return Conflict(f"another program listens on {where}: stop it first, or choose another port")
    reason = os.strerror(error.errno) if error.errno else str(error)
    return InvalidInput(f"cannot listen on {where}: {reason}")
