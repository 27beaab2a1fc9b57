"""Reads open blobs, piece by piece, and names their digests."""

import errno
import hashlib
from collections.abc import Iterator
from typing import BinaryIO, Final

from prefix_service.system.disk import translated
from prefix_service.system.host_memory import host_memory

PIECE: Final = 1 << 20
"""Bytes that are read and then hashed while they are in the processor's cache."""


def read_range(file: BinaryIO, start: int, stop: int) -> memoryview:
    """Returns the bytes `start:stop` of an open blob, in new memory.

    Raises:
        StorageFailed: the disk refused, or the file has become shorter.
    """
    with translated("read a blob"):
        data = host_memory(stop - start)
        file.seek(start)
        if sum(map(len, pieces(file, data))) != len(data):
            raise OSError(errno.EIO, "the file has become shorter")
    return data


def digest_of(sha256: "hashlib._Hash") -> str:
    """Returns the digest of the bytes that were hashed."""
    return f"sha256:{sha256.hexdigest()}"


def pieces(file: BinaryIO, data: memoryview) -> Iterator[memoryview]:
    """Fills `data` from a file, and yields each chunk; stops early if the file has become shorter."""
    at = 0
    while count := file.readinto(data[at : at + PIECE]):  # type: ignore[attr-defined]  # BufferedReader alone has it
        yield data[at : at + count]
        at += count
