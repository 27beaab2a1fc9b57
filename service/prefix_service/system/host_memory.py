"""Allocates host memory for bytes that are read in one go, and returns what is freed to the system."""

import asyncio
import contextlib
import ctypes
import mmap
from collections.abc import AsyncIterator
from typing import Final

from prefix_service.system.turns import in_thread

LARGE: Final = 32 << 20
"""The size in bytes from which malloc never reuses memory."""

_RETURNED: Final = 2 << 20
_ARENAS: Final = 2
_KEPT: Final = 32 << 20  # bytes of free blocks that malloc may keep
_TRIM_PAUSE: Final = 2.0  # seconds
_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8  # mallopt(3)


def return_freed_memory() -> None:
    """Lets blocks of 2 MiB or more return to the system as soon as they are freed, and threads share what is kept of
    smaller ones.

    glibc otherwise keeps blocks of up to 32 MiB, once one of that size was freed, and for each thread apart: several
    hundred MiB that no budget counts. With another C library this does nothing.
    """
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, _RETURNED)
        library.mallopt(_M_ARENA_MAX, _ARENAS)


@contextlib.asynccontextmanager
async def trimmed() -> AsyncIterator[None]:
    """Returns the small blocks that were freed to the system, too, every few seconds while the block runs, if there is
    much of them: glibc alone gives back what is free at the end of its heap.
    """
    trimming = asyncio.create_task(_keep_trimming())
    try:
        yield
    finally:
        trimming.cancel()


async def _keep_trimming() -> None:
    while True:
        await asyncio.sleep(_TRIM_PAUSE)
        await in_thread(_trim)


def _trim() -> None:
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallinfo2.restype = _Heap
        if library.mallinfo2().fordblks > _KEPT:
            library.malloc_trim(0)


class _Heap(ctypes.Structure):
    """The result of `mallinfo2` (mallinfo(3)); `fordblks` is the number of bytes in all free blocks."""

    _fields_ = (("before", ctypes.c_size_t * 8), ("fordblks", ctypes.c_size_t), ("keepcost", ctypes.c_size_t))


def host_memory(nbytes: int) -> memoryview:
    """Returns writable memory of `nbytes` bytes, which returns to the system with its last view.

    Large memory is not filled with zeros first, and uses huge pages if the system has them: most of the cost of reading
    a file from the page cache is the first touch of each small page. (In a virtual machine that returns free memory to
    its host, the first touch of what was free for seconds takes longer with huge pages.)

    Raises:
        MemoryError: the system has no memory left.
    """
    if nbytes < LARGE:
        return memoryview(bytearray(nbytes))
    try:
        block = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"the system gives no {nbytes} bytes") from error
    with contextlib.suppress(OSError, AttributeError):  # not every kernel or system has huge pages
        block.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(block)
