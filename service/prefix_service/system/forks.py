"""State that belongs to one process, and what becomes of it in a child that `fork()` made.

The child has copies of the parent's sockets, which lead to the parent's connections, and of its locks, which threads
may have held that the child does not have. CPython calls one hook in the child before `fork()` returns there; the hook
closes the copied sockets (the child's descriptors alone: nothing is sent or shut down) and renews every object that was
registered. Both are held by weak references.
"""

import os
import socket
import weakref
from typing import Protocol


class ProcessBound(Protocol):
    """An object with locks, threads or connections of the process that it was made in."""

    def renew(self) -> None:
        """Replace them, in a child that `fork()` has just made: no other thread runs there."""


_bound: "weakref.WeakSet[ProcessBound]" = weakref.WeakSet()
_sockets: "weakref.WeakSet[socket.socket]" = weakref.WeakSet()


def renew_in_child(bound: ProcessBound) -> None:
    """Call `bound.renew()` in every child, as long as the object lives."""
    _bound.add(bound)


def close_in_child(opened: socket.socket) -> None:
    """Close the copy of a socket in every child; the parent's connection stays as it is."""
    _sockets.add(opened)


def _after_fork() -> None:
    for copied in list(_sockets):
        copied.close()
    _sockets.clear()
    for bound in list(_bound):
        bound.renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
