"""Where an answer becomes a prefix: once for the cache, and for each caller in memory of its own. Needs torch."""

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
    """The prefix in a body, sharing its memory; float8 is decoded to float32, in memory that `allocate` returns.

    Raises:
        InvalidResponse: it is none.
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
    """The file in which a tensor lies; what is not aligned in a body was copied out of it."""
    file = file_of(memory)
    storages = [each.untyped_storage().data_ptr() for each in (tensor, memory_of(memoryview(memory)))]
    return file if storages[0] == storages[1] else None


def own(cached: Cached, *, is_shared: bool, pinned: bool) -> Prefix:
    """A prefix for one caller, who may write to it; `is_shared` tells whether a cache keeps the one that was decoded.

    Raises:
        InvalidResponse: there is not enough memory.
    """
    prefix = cached.prefix
    kv = prefix.kv
    if is_shared or cached.file is not None:  # forked processes share the memory of a file too
        kv = replace(kv, tensor=own_copy(kv.tensor, cached.file, pinned=pinned))
    return replace(prefix, kv=kv, metadata=deepcopy(prefix.metadata))
