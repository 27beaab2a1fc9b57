"""The memory of a tensor as bytes, and back; nothing is copied."""

import ctypes

import torch
from torch import Tensor


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, kept alive by the view."""
    if not tensor.nbytes:
        return memoryview(bytearray())  # ctypes cannot view an array without elements as bytes
    array = (ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())
    array.tensor = tensor  # type: ignore[attr-defined]  # ctypes instances take attributes; this one owns the memory
    return memoryview(array).cast("B")


def memory_of(view: memoryview) -> Tensor:
    """uint8 `[len(view)]` over the same bytes. The tensor that `bytes_of` made a view of is found again: CUDA follows a
    copy out of pinned memory by the storage that owns it, and would not know a new one over a part of it."""
    owner = getattr(view.obj, "tensor", None)
    return owner if isinstance(owner, Tensor) else torch.frombuffer(view, dtype=torch.uint8)
