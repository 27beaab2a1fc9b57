"""`blobs.folder` is durable, and keeps the contract of a blob store even when the disk fails."""

import fcntl
import os
import resource
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from prefix_service.blobs.folder import FolderBlobStore
from prefix_service.blobs.port import StagedBlob
from prefix_service.errors import OutOfSpace, StorageFailed
from tests.blobs.test_contract import DATA, digest_of, opened, staged

Broken = Callable[[FolderBlobStore, str], object]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "blobs"


@pytest.fixture
def folder(root: Path) -> FolderBlobStore:
    return FolderBlobStore(root)


def files_in(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.is_file() and path != root / "lock"]


def blobs_in(root: Path) -> list[Path]:
    return [path for path in files_in(root) if path.parent.name != "quarantine"]


def test_a_folder_holds_nothing_else(folder: FolderBlobStore, root: Path) -> None:
    """The folder has one file for each blob, named by its digest, and none for a discarded one."""
    digest = staged(folder).commit()
    staged(folder).discard()
    assert blobs_in(root) == [folder.path(digest)]
    assert folder.path(digest).read_bytes() == DATA


def abandoned(root: Path, seconds_ago: float = 0) -> Path:
    """Returns the file that a process left when it was killed in an upload."""
    path = root / "staging" / f"left-{seconds_ago}"
    path.write_bytes(b"half")
    moment = path.stat().st_mtime - seconds_ago
    os.utime(path, (moment, moment))
    return path


def test_a_sweep_removes_what_a_crash_left(folder: FolderBlobStore, root: Path) -> None:
    """A sweep removes old uploads of dead processes, and neither a blob nor a running upload."""
    digest = staged(folder).commit()
    old, new, running = abandoned(root, 100), abandoned(root, 10), staged(folder)
    assert FolderBlobStore(root).sweep(older_than=60) == 1
    assert (old.exists(), new.exists()) == (False, True)
    assert FolderBlobStore(root).sweep(older_than=0) == 1
    assert running.commit() == digest
    assert blobs_in(root) == [folder.path(digest)]


def aged(folder: FolderBlobStore, data: bytes, seconds: float) -> str:
    """Returns the digest of a blob that was committed so long ago."""
    digest = staged(folder, data).commit()
    path = folder.path(digest)
    moment = path.stat().st_mtime - seconds
    os.utime(path, (moment, moment))
    return digest


def test_a_listing_tells_sizes_and_ages(folder: FolderBlobStore) -> None:
    """`listed` yields the size and age of every blob, and nothing that is staged."""
    digests = {aged(folder, b"old", 1000): 3, aged(folder, b"newer", 10): 5}
    unfinished = staged(folder, b"unfinished")
    found = {blob.digest: blob for blob in folder.listed()}
    unfinished.discard()
    assert {digest: blob.size for digest, blob in found.items()} == digests
    ages = [found[digest].age for digest in digests]
    assert ages == pytest.approx([1000, 10], abs=5)


def test_removal_spares_what_was_committed_again(folder: FolderBlobStore) -> None:
    """A blob's age counts from its last commit, so `remove` spares one that an upload has stored again."""
    old, again = aged(folder, b"old", 1000), aged(folder, b"again", 1000)
    staged(folder, b"again").commit()
    assert folder.remove([old, again], older_than=60) == {old}
    assert (folder.exists(old), folder.exists(again)) == (False, True)
    assert folder.remove([old], older_than=60) == set()


def test_an_upload_that_began_long_ago_is_new_when_it_is_committed(folder: FolderBlobStore, root: Path) -> None:
    """A slow upload's last byte may be old by the time that its version is published."""
    blob = staged(folder)
    for path in (root / "staging").iterdir():
        os.utime(path, (0, 0))
    assert folder.remove([blob.commit()], older_than=60) == set()


def test_a_removal_waits_for_a_rename(folder: FolderBlobStore) -> None:
    """`remove` waits for the lock that a commit holds, and then spares the blob that was renewed."""
    digest = aged(folder, DATA, 1000)
    with ThreadPoolExecutor(1) as pool:
        with folder._locked(fcntl.LOCK_SH):
            removal = pool.submit(folder.remove, [digest], 60)
            with pytest.raises(TimeoutError):
                removal.result(0.2)
            os.utime(folder.path(digest))
        assert removal.result(60) == set()
    assert folder.read(digest) == DATA


@pytest.mark.parametrize("read", [FolderBlobStore.read, opened], ids=["read", "open"])
def test_a_folder_in_a_blobs_place(folder: FolderBlobStore, read: Broken) -> None:
    """An error of the system raises StorageFailed."""
    folder.path(digest_of(DATA)).mkdir(parents=True)
    with pytest.raises(StorageFailed, match=f"cannot read blob {digest_of(DATA)}: Is a directory"):
        read(folder, digest_of(DATA))


def test_a_place_that_cannot_hold_blobs(tmp_path: Path) -> None:
    """The store refuses an unusable folder when it is made, not at the first upload."""
    (tmp_path / "file").touch()
    with pytest.raises(StorageFailed, match="cannot make the blob folder: Not a directory"):
        FolderBlobStore(tmp_path / "file" / "blobs")


def test_a_blob_is_durable_before_it_is_visible(folder: FolderBlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A commit flushes the file, renames it and flushes its folder: after a crash the blob is whole or absent."""
    calls: list[str] = []
    sync, replace = os.fsync, Path.replace

    def spy_sync(handle: int) -> None:
        kind = "folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else f"file of {os.fstat(handle).st_size}"
        calls.append(kind)
        sync(handle)

    def spy_replace(path: Path, target: Path) -> Path:
        calls.append("rename")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", spy_sync)
    monkeypatch.setattr(Path, "replace", spy_replace)
    staged(folder).commit()
    assert calls == [f"file of {len(DATA)}", "folder", "rename", "folder"]


def upload(blob: StagedBlob, size: int) -> None:
    for _ in range(size // len(DATA) + 1):
        blob.write(DATA)
    blob.commit()


def fill(store: FolderBlobStore, root: Path) -> None:
    """Uploads more than the disk has room for, and checks that nothing of it stays."""
    before = files_in(root)
    blob = store.stage()
    with pytest.raises(OutOfSpace, match=r"No space left on device|File too large"):
        upload(blob, 4 << 20)
    blob.discard()
    assert files_in(root) == before


def test_a_full_disk_is_out_of_space(tiny_disk: Path) -> None:
    """On a full file system earlier blobs stay readable, and a blob that fits is stored afterwards."""
    root = tiny_disk / "blobs"
    store = FolderBlobStore(root)
    digest = staged(store, b"small").commit()
    fill(store, root)
    assert bytes(store.read(digest)) == b"small"
    assert store.read(staged(store).commit()) == DATA


@contextmanager
def largest_file(nbytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_size_limit_is_out_of_space(folder: FolderBlobStore, root: Path) -> None:
    """The system's limit on a file's size raises OutOfSpace, and any user can run this test."""
    with largest_file(1 << 20):
        fill(folder, root)


def test_a_store_whose_folder_vanished(folder: FolderBlobStore, root: Path) -> None:
    """Staging in a folder that is gone raises StorageFailed, not NotFound."""
    (root / "staging").rmdir()
    with pytest.raises(StorageFailed):
        folder.stage()
