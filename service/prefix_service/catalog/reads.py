"""Reads of the catalog from an event loop, which cannot wait for a disk or a server that hangs."""

from collections.abc import Callable
from typing import Final, TypeVar

import anyio
from anyio import CapacityLimiter, to_thread
from anyio.lowlevel import RunVar

from prefix_service.errors import StorageFailed

T = TypeVar("T")

DEADLINE: Final = 2.0
"""Seconds that a caller waits for a read."""

_THREADS: Final = 16
_threads: RunVar[CapacityLimiter] = RunVar("prefix_service catalog reads")


async def read_catalog(call: Callable[..., T], *arguments: object) -> T:
    """Call something that only reads the catalog, in a thread; give up after `DEADLINE`.

    A thread cannot be killed, so a call that hangs goes on; `Database` bounds how many can. The threads are counted
    apart from those of other work, which a hanging catalog must not stop.

    Raises:
        StorageFailed: no answer in time, or what the call raises.
    """
    try:
        limiter = _threads.get()
    except LookupError:
        limiter = CapacityLimiter(_THREADS)
        _threads.set(limiter)
    try:
        with anyio.fail_after(DEADLINE):
            return await to_thread.run_sync(call, *arguments, limiter=limiter, abandon_on_cancel=True)
    except TimeoutError as error:
        raise StorageFailed(f"the catalog has not answered within {DEADLINE:g} seconds") from error
