"""Turns an answer into a prefix: once for the cache, and then in memory of its own for each caller. Needs torch."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace

from torch import Tensor

from prefix_service.client.cache.cache import Cached
from prefix_service.client.cache.memory import MemoryFile, file_of, own_copy
from prefix_service.client.prefixes.prefix import Prefix
from prefix_service.client.protocol import Buffer
from prefix_service.prefix.buffers import memory_of
from prefix_service.prefix.wire.received import read_kv, read_prefix_file


def decode(body: Buffer, etag: str, allocate: Callable[[int], memoryview]) -> Cached:
    """Returns the prefix in a body, whose memory it shares; float8 is decoded to float32, in memory from `allocate`.

    Raises:
        InvalidResponse: the body is not a prefix.
    """
    received = read_prefix_file(body)
    memory = body

    def decoded(size: int) -> memoryview:
        nonlocal memory
        memory = allocate(size)
        return memory

    kv = read_kv(received, decoded)
    return Cached(Prefix(kv, received.metadata), etag, _file_under(kv.tensor, memory))


def _file_under(tensor: Tensor, memory: Buffer) -> MemoryFile | None:
    """Returns the file that a tensor is in; None if the tensor was not aligned, and was copied out of the body."""
    file = file_of(memory)
    storages = [each.untyped_storage().data_ptr() for each in (tensor, memory_of(memoryview(memory)))]
    return file if storages[0] == storages[1] else None


def own(cached: Cached, *, is_shared: bool, pinned: bool) -> Prefix:
    """Returns a prefix that one caller owns and may write to. `is_shared` is whether a cache keeps the decoded one.

    Raises:
        InvalidResponse: there is not enough memory.
    """
    prefix = cached.prefix
    kv = prefix.kv
    if is_shared or cached.file is not None:  # forked processes share the memory of a file too
        kv = replace(kv, tensor=own_copy(kv.tensor, cached.file, pinned=pinned))
    return replace(prefix, kv=kv, metadata=deepcopy(prefix.metadata))
