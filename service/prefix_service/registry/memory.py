"""Host memory that a device copies from, and what an allocator says when there is none left."""

from collections.abc import Callable
from typing import Final

import torch

from prefix_service.prefix.buffers import bytes_of
from prefix_service.system.host_memory import host_memory

_HOST: Final = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory", "new thread")


def memory_for(device: torch.device) -> Callable[[int], memoryview]:
    """Allocates so many bytes of host memory; pinned where they go on to a CUDA device."""
    return _pinned if device.type == "cuda" else host_memory


def _pinned(nbytes: int) -> memoryview:
    return bytes_of(torch.empty(nbytes, dtype=torch.uint8, pin_memory=True))


def exhausted(error: BaseException) -> bool:
    """Whether memory itself ran out, whatever the budgets say."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _HOST)


def of_device(error: BaseException) -> bool:
    """Whether it was the memory of the accelerator."""
    return isinstance(error, torch.OutOfMemoryError)
