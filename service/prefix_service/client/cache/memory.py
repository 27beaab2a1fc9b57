"""Memory for bodies: each is received once, and every caller gets the body as its own. Needs torch.

A large body is received into a file in memory (memfd_create(2)), and every caller gets a private mapping of it: the
kernel copies a page when a caller first writes to it. A small body, or any body on a system without such files, is
copied for each caller, which is faster up to about 2 MB.
"""

import contextlib
import os
import resource
import weakref
from typing import Final

import torch
from torch import Tensor

from prefix_service.errors import InvalidRequest, InvalidResponse
from prefix_service.prefix.buffers import bytes_of, memory_of
from prefix_service.system.host_memory import LARGE, host_memory

WORTH_MAPPING: Final = 2 << 20
"""The size in bytes from which a mapping is faster than a copy, including the page faults of reading it."""
_MOST_OPEN: Final = 1024
_open: Final = set[int]()


class MemoryFile:
    """A file in memory that is not written any more. `view` maps it for one caller.

    It keeps one file descriptor open, and closes it when it is garbage collected. Views outlive it and keep no
    descriptor.
    """

    def __init__(self, handle: int, size: int) -> None:
        self._handle, self._size = handle, size
        self._identity = _identity(handle)
        _open.add(handle)
        weakref.finalize(self, _close, handle, self._identity).atexit = False

    def view(self) -> Tensor:
        """Returns the file's bytes, uint8 `[size]`; no other view sees what is written to them.

        Raises:
            OSError: the kernel refuses another mapping, or the process has closed the descriptor.
        """
        # A program may close every descriptor (a daemon does), and the number can then be another file's.
        own = os.open(f"/proc/self/fd/{self._handle}", os.O_RDONLY)
        try:
            if _identity(own) != self._identity:
                raise OSError("the file in memory was closed by the program")
            return map_file(own, self._size)
        finally:
            os.close(own)


def _may_keep_open() -> bool:
    """Returns whether another file may stay open: at most 1,024, and a
    quarter of the files that the process may open.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return len(_open) < (_MOST_OPEN if soft == resource.RLIM_INFINITY else min(_MOST_OPEN, soft // 4))


def allocate(size: int, *, pinned: bool) -> memoryview:
    """Returns host memory of `size` bytes with arbitrary content; `pinned` memory is sent to a GPU without another
    copy.

    Raises:
        InvalidResponse: there is not enough memory.
        InvalidRequest: there is no GPU to pin it for.
    """
    if pinned and not torch.cuda.is_available():
        raise InvalidRequest("pin_memory=True needs a GPU that torch can use, and there is none")
    try:
        if pinned or size < LARGE:
            return bytes_of(torch.empty(size, dtype=torch.uint8, pin_memory=pinned))
        return host_memory(size)
    except (MemoryError, RuntimeError) as error:
        raise InvalidResponse(f"the answer claims {size} bytes, for which there is no memory") from error


def allocate_for_many(size: int, *, pinned: bool) -> memoryview:
    """Returns host memory for a body that a cache keeps: a file in memory if that is faster, else plain memory.

    Raises:
        InvalidResponse: there is not enough memory.
        InvalidRequest: there is no GPU to pin it for.
    """
    if pinned or size < WORTH_MAPPING or not _may_keep_open() or not hasattr(os, "memfd_create"):
        return allocate(size, pinned=pinned)
    try:
        handle = os.memfd_create("prefix")
    except OSError:  # no more files
        return allocate(size, pinned=False)
    file = MemoryFile(handle, size)
    try:
        os.ftruncate(handle, size)
        return _in_file(map_file(handle, size, shared=True), file)
    except OSError:  # no address space, or no /proc
        return allocate(size, pinned=False)


def map_for_many(handle: int, size: int) -> memoryview:
    """Returns a private mapping of an open file that a cache keeps; keeps the file open, if allowed, for more mappings.

    Raises:
        OSError: the file cannot be mapped.
    """
    mapped = map_file(handle, size)
    return _in_file(mapped, MemoryFile(os.dup(handle), size)) if _may_keep_open() else bytes_of(mapped)


def _in_file(mapped: Tensor, file: MemoryFile) -> memoryview:
    """Returns the bytes of a mapping of `file`, from which `file_of` can find the file."""
    view = bytes_of(mapped)
    view.obj.file = file  # type: ignore[attr-defined]  # as `bytes_of` stores the tensor
    return view


def file_of(memory: bytearray | memoryview) -> MemoryFile | None:
    """Returns the file that memory is in, if it was allocated in one."""
    file = getattr(memory.obj, "file", None) if isinstance(memory, memoryview) else None
    return file if isinstance(file, MemoryFile) else None


def map_file(handle: int, size: int, *, shared: bool = False) -> Tensor:
    """Returns the first `size` bytes of an open file as a mapping, uint8 `[size]`; private unless `shared`.

    torch's mapping, unlike Python's, keeps no file descriptor. It is wrapped because `torch.multiprocessing` takes a
    bare one for its own shared memory, and fails to send it.

    Raises:
        OSError: the file cannot be mapped.
    """
    try:
        mapped = torch.from_file(f"/proc/self/fd/{handle}", shared=shared, size=size, dtype=torch.uint8)
    except RuntimeError as error:
        raise OSError(f"a file in memory cannot be mapped: {error!s:.200}") from error
    return torch.frombuffer(bytes_of(mapped), dtype=torch.uint8)


def own_copy(shared: Tensor, file: MemoryFile | None, *, pinned: bool) -> Tensor:
    """Returns the values of a contiguous tensor in memory of the caller's own; `file` is the file that the tensor is
    in.

    Raises:
        InvalidResponse: there is not enough memory.
    """
    if file is not None:
        start = shared.data_ptr() - shared.untyped_storage().data_ptr()
        try:
            return file.view()[start : start + shared.nbytes].view(shared.dtype).view(shared.shape)
        except OSError:  # too many mappings
            pass
    copy = memory_of(allocate(shared.nbytes, pinned=pinned))
    return copy.view(shared.dtype).view(shared.shape).copy_(shared)


def _identity(handle: int) -> tuple[int, int]:
    found = os.fstat(handle)
    return found.st_dev, found.st_ino


def _close(handle: int, identity: tuple[int, int]) -> None:
    _open.discard(handle)
    with contextlib.suppress(OSError):  # the program has closed it
        if _identity(handle) == identity:
            os.close(handle)
