"""Host memory for prefixes: when one is dropped, the next is received into its memory.

The kernel fills fresh memory with zeros when it is first touched, which takes about as long as receiving a prefix.
"""

import ctypes
import mmap
import threading
import weakref
from collections import deque
from queue import SimpleQueue
from typing import cast

from prefix_service.client.cache.memory import allocate
from prefix_service.system.host_memory import LARGE


class ReusedMemory:
    """Memory that is used again once nothing refers to it; safe to share between threads.

    Spare memory and memory in use have at most `budget` bytes together. Memory in use may exceed that alone, and then
    none is kept. Blocks of less than 32 MiB do not count.
    """

    def __init__(self, budget: int) -> None:
        self._budget, self._in_use = budget, 0  # bytes
        self._spare: deque[mmap.mmap] = deque()  # the oldest first
        self._returned = SimpleQueue[mmap.mmap]()  # by finalizers, which may run anywhere, also within `allocate`
        self._lock = threading.Lock()

    def allocate(self, nbytes: int) -> memoryview:
        """Returns memory of `nbytes` bytes with arbitrary content. It is used again when the last view of it and the
        last tensor in it are gone.

        Raises:
            InvalidResponse: there is not enough memory.
        """
        if nbytes < LARGE or nbytes > self._budget:  # malloc already reuses small blocks; too large ones are not kept
            return allocate(nbytes, pinned=False)
        try:
            with self._lock:
                self._take_back()
                block = self._spare_of(nbytes)
                self._trim(nbytes)
                block = block or cast("mmap.mmap", allocate(nbytes, pinned=False).obj)
                array = (ctypes.c_ubyte * nbytes).from_buffer(block)
                self._in_use += nbytes
        finally:
            self._settle()  # what was returned meanwhile
        weakref.finalize(array, self._return, block).atexit = False
        return memoryview(array).cast("B")

    def _return(self, block: mmap.mmap) -> None:
        self._returned.put(block)
        self._settle()

    def _settle(self) -> None:
        """Takes back what was returned, unless another thread holds the lock: that one does it afterwards."""
        while not self._returned.empty() and self._lock.acquire(blocking=False):
            try:
                self._take_back()
                self._trim(0)
            finally:
                self._lock.release()

    def _take_back(self) -> None:
        while not self._returned.empty():
            block = self._returned.get()
            self._in_use -= len(block)
            self._spare.append(block)

    def _trim(self, wanted: int) -> None:
        """Frees spare memory until the budget has room for `wanted` bytes more, or none is left."""
        while self._spare and self._in_use + wanted + sum(map(len, self._spare)) > self._budget:
            self._spare.popleft()

    def _spare_of(self, nbytes: int) -> mmap.mmap | None:
        """Returns the spare block whose size is nearest, resized to `nbytes`; None if there is none."""
        if not self._spare:
            return None
        block = min(self._spare, key=lambda spare: abs(len(spare) - nbytes))
        self._spare.remove(block)
        try:
            if len(block) != nbytes:
                block.resize(nbytes)
        except (BufferError, OSError, SystemError):  # its last view is yet to end, no address space, no mremap(2)
            return None
        return block
