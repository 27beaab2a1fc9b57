"""Views a tensor's memory as bytes, and bytes as a tensor, without a copy."""

import ctypes

import torch
from torch import Tensor


def bytes_of(tensor: Tensor) -> memoryview:
    """Returns the memory of a contiguous CPU tensor as bytes; the view keeps the tensor alive."""
    if not tensor.nbytes:
        return memoryview(bytearray())  # ctypes cannot view an array without elements as bytes
    array = (ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())
    array.tensor = tensor  # type: ignore[attr-defined]  # ctypes instances take attributes; this one owns the memory
    return memoryview(array).cast("B")


def memory_of(view: memoryview) -> Tensor:
    """Returns a uint8 tensor `[len(view)]` that shares the memory of `view`.

    For a view made by `bytes_of`, this is the tensor that owns the memory: CUDA tracks an asynchronous copy out of
    pinned memory by the storage that owns it, and would not know a new storage over the same bytes.
    """
    owner = getattr(view.obj, "tensor", None)
    return owner if isinstance(owner, Tensor) else torch.frombuffer(view, dtype=torch.uint8)
