"""The interface of a blob store, and what its callers pass to it. Digests are `sha256:<64 hex>`."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

Allocate = Callable[[int], memoryview]
"""Allocates the writable memory of `n` bytes that a blob is read into."""

ChunkObserver = Callable[[memoryview], object]
"""Is called with each chunk of a blob in order, before the blob is verified."""


@dataclass(frozen=True, slots=True)
class StoredBlob:
    """A blob in a listing: its size in bytes, and the seconds since its last commit by the file system's clock."""

    digest: str
    size: int
    age: float


class StagedBlob(Protocol):
    """A blob while it is written; it is not visible until `commit`."""

    size: int

    @property
    def digest(self) -> str: ...
    def write(self, data: bytes | bytearray | memoryview) -> None: ...
    def read(self, start: int = ..., stop: int | None = ...) -> memoryview: ...
    def commit(self) -> str: ...
    def discard(self) -> None: ...


class BlobStore(Protocol):
    """The interface of a blob store that the library needs.

    `identity` names where the blobs are: a catalog belongs to the blobs of one place.
    """

    @property
    def identity(self) -> str: ...
    def stage(self) -> StagedBlob: ...
    def read(self, digest: str, allocate: Allocate = ..., observer: ChunkObserver | None = None) -> memoryview: ...
    def open(self, digest: str) -> BinaryIO: ...
    def copy(self, digest: str, target: Path) -> int: ...
    def exists(self, digest: str) -> bool: ...
    def check(self) -> None: ...
    def listed(self) -> Iterator[StoredBlob]: ...
    def remove(self, digests: Sequence[str], older_than: float, within: float = ...) -> set[str]: ...
    def sweep(self, older_than: float) -> int: ...
