"""What an allocator says when there is no memory: of the device, of the host, of a thread's stack."""

from typing import Final

import torch

_HOST: Final = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory", "new thread")


def exhausted(error: BaseException) -> bool:
    """Whether memory itself ran out, whatever the budgets say."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _HOST)


def of_device(error: BaseException) -> bool:
    """Whether it was the memory of the accelerator."""
    return isinstance(error, torch.OutOfMemoryError)
