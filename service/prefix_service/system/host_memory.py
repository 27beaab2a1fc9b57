"""Allocates host memory for bytes that are read in one go; large memory is not cleared first."""

import contextlib
import mmap
from typing import Final

_LARGE: Final = 32 << 20  # from this size on, malloc never reuses memory


def host_memory(nbytes: int) -> memoryview:
    """Returns writable memory of `nbytes` bytes, which returns to the system with its last view.

    Large memory is not filled with zeros first, and uses huge pages if the system has them: most of the cost of reading
    a file from the page cache is the first touch of each small page.

    Raises:
        MemoryError: the system has no memory left.
    """
    if nbytes < _LARGE:
        return memoryview(bytearray(nbytes))
    try:
        block = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"the system gives no {nbytes} bytes") from error
    with contextlib.suppress(OSError, AttributeError):  # not every kernel or system has huge pages
        block.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(block)
