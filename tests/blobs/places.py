"""The places that blobs can be kept in, each as the contract's tests need it."""

import os
import shutil
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol
from unittest.mock import patch

import obstore
from obstore.store import S3Store

from prefix_service.blobs.bucket import Bucket
from prefix_service.blobs.folder import FolderBlobStore
from prefix_service.blobs.names import hex_of, path_of
from prefix_service.blobs.port import BlobStore
from prefix_service.blobs.s3 import S3BlobStore
from tests.seaweedfs import KEYS

LOTS = 1 << 30


class Place(Protocol):
    """A place with one store on it."""

    store: BlobStore

    def another(self) -> BlobStore:
        """Returns another store on the same place, as another process has."""
        ...

    def overwrite(self, digest: str, data: bytes) -> None:
        """Replaces the stored bytes of a blob."""
        ...

    def quarantined(self, digest: str) -> bytes:
        """Returns the bytes of a damaged blob that was put aside."""
        ...


@dataclass
class FolderPlace:
    """A folder."""

    root: Path
    store: FolderBlobStore = field(init=False)

    def __post_init__(self) -> None:
        self.store = FolderBlobStore(self.root)

    def another(self) -> FolderBlobStore:
        return FolderBlobStore(self.root)

    def overwrite(self, digest: str, data: bytes) -> None:
        self.store.path(digest).write_bytes(data)

    def quarantined(self, digest: str) -> bytes:
        return (self.root / "quarantine" / hex_of(digest)).read_bytes()


@dataclass
class BucketPlace:
    """A new path in a bucket of a server, with a local folder for copies."""

    endpoint: str
    folder: Path
    cache_bytes: int = LOTS
    path: str = field(default_factory=lambda: f"blobs/{uuid.uuid4().hex}")
    store: S3BlobStore = field(init=False)

    def __post_init__(self) -> None:
        self.store = self.another()

    def another(
        self, folder: Path | None = None, endpoint: str | None = None, *, read_only: bool = False
    ) -> S3BlobStore:
        with patch.dict(os.environ, KEYS | {"AWS_ENDPOINT_URL": endpoint or self.endpoint}):
            bucket = Bucket(f"s3://tests/{self.path}")
        return S3BlobStore(bucket, folder or self.folder, self.cache_bytes, read_only=read_only)

    def objects(self) -> S3Store:
        """Returns the objects below the path."""
        return objects(self.endpoint, self.path)

    def names(self) -> set[str]:
        """Returns the names of all objects but the one that tells the time."""
        found = {each["path"] for page in obstore.list(self.objects()) for each in page}
        return found - {"clock"}

    def overwrite(self, digest: str, data: bytes) -> None:
        obstore.put(self.objects(), path_of(digest), data)
        self.forget()

    def quarantined(self, digest: str) -> bytes:
        return obstore.get(self.objects(), f"quarantine/{hex_of(digest)}").bytes().to_bytes()

    def cached(self, digest: str) -> Path:
        """Returns the path of a blob's local copy."""
        return self.folder / path_of(digest)

    def forget(self) -> None:
        """Removes all local copies."""
        for folder in self.folder.glob("[0-9a-f][0-9a-f]"):
            shutil.rmtree(folder)


def objects(endpoint: str, path: str | None = None) -> S3Store:
    """Returns the objects of the tests' bucket on a server, below a path."""
    return S3Store(
        "tests",
        prefix=path,
        endpoint=endpoint,
        access_key_id=KEYS["AWS_ACCESS_KEY_ID"],
        secret_access_key=KEYS["AWS_SECRET_ACCESS_KEY"],
        client_options={"allow_http": True},
    )
