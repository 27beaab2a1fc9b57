"""Memory of this host for bytes that are read at once: large, and written for the first time by what fills it."""

import contextlib
import mmap
from typing import Final

_LARGE: Final = 32 << 20  # from here on malloc never uses memory again that was touched before


def host_memory(nbytes: int) -> memoryview:
    """Writable memory, given back to the system with its last view.

    A large one is not filled with zeros first, and lies in huge pages where the system has them: most of what reading
    a file from the page cache costs is the first touch of each small page.

    Raises:
        MemoryError: there is none left.
    """
    if nbytes < _LARGE:
        return memoryview(bytearray(nbytes))
    try:
        block = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"the system gives no {nbytes} bytes") from error
    with contextlib.suppress(OSError, AttributeError):  # a kernel, or a system, without them
        block.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(block)
