"""State that belongs to one process, and its renewal in a child that `fork()` made.

The child has copies of the parent's sockets, which lead to the parent's connections, and of its locks, which may be
held by threads that the child does not have. CPython calls one hook in the child before `fork()` returns there. The
hook closes the copied sockets (only the child's descriptors: nothing is sent or shut down) and renews every registered
object. Sockets and objects are held by weak references.
"""

import os
import socket
import weakref
from typing import Protocol


class ProcessBound(Protocol):
    """An object with locks, threads or connections of the process that created it."""

    def renew(self) -> None:
        """Replaces its locks, threads and connections, in a child that `fork()`
        has just made: no other thread runs there.
        """


_bound: "weakref.WeakSet[ProcessBound]" = weakref.WeakSet()
_sockets: "weakref.WeakSet[socket.socket]" = weakref.WeakSet()


def renew_in_child(bound: ProcessBound) -> None:
    """Calls `bound.renew()` in every child of a fork, as long as the object lives."""
    _bound.add(bound)


def close_in_child(opened: socket.socket) -> None:
    """Closes the copy of a socket in every child of a fork; the parent's connection stays open."""
    _sockets.add(opened)


def _after_fork() -> None:
    for copied in list(_sockets):
        copied.close()
    _sockets.clear()
    for bound in list(_bound):
        bound.renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
