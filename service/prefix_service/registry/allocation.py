"""Allocates host memory that suits a device, and recognises the errors of exhausted memory."""

from collections.abc import Callable
from typing import Final

import torch

from prefix_service.prefix.buffers import bytes_of
from prefix_service.system.host_memory import host_memory

_HOST: Final = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory", "new thread")


def memory_for(device: torch.device) -> Callable[[int], memoryview]:
    """Returns the allocator of host memory for a device: pinned if the bytes go on to a CUDA device."""
    return _pinned if device.type == "cuda" else host_memory


def _pinned(nbytes: int) -> memoryview:
    return bytes_of(torch.empty(nbytes, dtype=torch.uint8, pin_memory=True))


def exhausted(error: BaseException) -> bool:
    """Returns whether an error means that memory itself ran out, whatever the budgets say."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _HOST)


def of_device(error: BaseException) -> bool:
    """Returns whether an error means that the accelerator's memory ran out."""
    return isinstance(error, torch.OutOfMemoryError)
