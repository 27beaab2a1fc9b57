"""The number of files that this process can open, and the share of them that connections get."""

import fcntl
import os
import resource
from typing import Final

RESERVE: Final = 256
"""Files that are kept for the catalog, blobs, listening sockets and the event loop."""

_ENOUGH: Final = 1 << 20
_EACH: Final = 2  # a connection's socket, and the file that it reads or writes


def raise_file_limit() -> None:
    """Raises the soft limit of open files to the hard limit; child processes inherit it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _ENOUGH if hard == resource.RLIM_INFINITY else min(hard, _ENOUGH)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def most_connections(wanted: int) -> int:
    """Returns the most connections that may be open: `wanted`, or fewer if the limit of open files is lower."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return wanted
    return max(1, min(wanted, (soft - RESERVE) // _EACH))


def make_room_for_connections(connections: int) -> None:
    """Grows the kernel's table of this process's open files to what so many connections need.

    Linux doubles the table when it is full. In a process with threads each doubling waits, inside `accept`, until all
    processors have passed a quiet state (`expand_fdtable` in Linux's fs/file.c): tens of milliseconds on a busy
    machine, in which the event loop answers nobody. The table never shrinks.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = RESERVE + _EACH * connections
    last = (wanted if soft == resource.RLIM_INFINITY else min(wanted, soft)) - 1
    source = os.open(os.devnull, os.O_RDONLY)
    try:
        os.close(fcntl.fcntl(source, fcntl.F_DUPFD_CLOEXEC, last))
    finally:
        os.close(source)
