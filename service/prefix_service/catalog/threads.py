"""Reads and writes of the catalog from an event loop, which cannot wait for a disk or a server that hangs.

Both have a few threads of their own, in which tenants take turns; `ASKING` says whose turn a call takes.
"""

import threading
from collections.abc import Callable
from functools import partial
from typing import Final, TypeVar

import anyio
from anyio.lowlevel import RunVar

from prefix_service.errors import Overloaded, StorageFailed
from prefix_service.system.spans import span
from prefix_service.system.turns import ASKING, Turns

T = TypeVar("T")

DEADLINE: Final = 2.0
"""Seconds that a caller waits for a read."""

_READS: Final = 8  # at a time; as many as there are connections for readers
_READS_OF_TENANT: Final = 4
_WRITES: Final = 4  # at a time: SQLite has one writer, and so has PostgreSQL for each tenant
_WRITES_OF_TENANT: Final = 1
_readers: RunVar[Turns] = RunVar("prefix_service catalog reads")
_writers: RunVar[Turns] = RunVar("prefix_service catalog writes")


async def read_catalog(call: Callable[..., T], *arguments: object) -> T:
    """Call something that only reads the catalog, in a thread; give up after `DEADLINE`. What lost its connection is
    tried again once.

    A thread cannot be killed, so a call that hangs goes on; `Database` bounds how many can. The threads are counted
    apart from those of other work, which a hanging catalog must not stop.

    Raises:
        Overloaded: the catalog answers, and the tenant's other reads took its turns for so long.
        StorageFailed: no answer in time, or what the call raises.
    """
    turns, tenant = _turns(_readers, _READS, _READS_OF_TENANT), ASKING.get()
    completed, begun = turns.completed, threading.Event()

    def begin() -> T:
        begun.set()
        return _twice(call, *arguments)

    try:
        with span("read the catalog"), anyio.fail_after(DEADLINE):
            return await turns.run(tenant, begin, abandons=True)
    except TimeoutError as error:
        if turns.completed > completed and not begun.is_set():
            whose = f"tenant {tenant!r}" if tenant else "the platform's admins"
            raise Overloaded(
                f"this request has waited {DEADLINE:g} seconds for its turn to read the catalog, behind other requests "
                f"of {whose}: send fewer at a time, and try again"
            ) from error
        raise StorageFailed(f"the catalog has not answered within {DEADLINE:g} seconds") from error


async def write_catalog(call: Callable[..., T], *arguments: object) -> T:
    """Call something that writes to the catalog, in a thread. A caller that is cancelled waits until it has ended. A
    transaction that left nothing, since it lost its connection or came into conflict with others, is tried again once.

    Raises:
        StorageFailed: as `Database.writing`, or what the call raises.
    """
    turns = _turns(_writers, _WRITES, _WRITES_OF_TENANT)
    with span("write the catalog"):
        return await turns.run(ASKING.get(), partial(_twice, call, *arguments))


def _twice(call: Callable[..., T], *arguments: object) -> T:
    """Calls something that is one transaction, and again if it lost its connection, or a conflict, and left nothing."""
    try:
        return call(*arguments)
    except StorageFailed as error:
        if not error.is_undone:
            raise
        return call(*arguments)


def _turns(of_loop: RunVar[Turns], places: int, most: int) -> Turns:
    try:
        return of_loop.get()
    except LookupError:
        of_loop.set(turns := Turns(places, most))
        return turns
