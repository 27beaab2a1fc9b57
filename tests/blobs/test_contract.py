"""Every blob store keeps the contract of `blobs.port`: a folder, SeaweedFS, and moto's S3 server."""

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from prefix_service.blobs.port import BlobStore, StagedBlob
from prefix_service.errors import CorruptBlob, NotFound
from tests.blobs.places import BucketPlace, FolderPlace, Place
from tests.seaweedfs import SeaweedFS

DATA = bytes(range(256)) * 1000
LARGE = DATA * 80
"""Several ranges of a bucket."""


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


@pytest.fixture
def in_folder(tmp_path: Path) -> FolderPlace:
    return FolderPlace(tmp_path / "blobs")


@pytest.fixture
def on_seaweedfs(tmp_path: Path, seaweedfs: SeaweedFS) -> BucketPlace:
    return BucketPlace(seaweedfs.url, tmp_path / "copies")


@pytest.fixture
def on_seaweedfs_uncached(tmp_path: Path, seaweedfs: SeaweedFS) -> BucketPlace:
    return BucketPlace(seaweedfs.url, tmp_path / "copies", cache_bytes=1)


@pytest.fixture
def on_moto(tmp_path: Path, moto: str) -> BucketPlace:
    return BucketPlace(moto, tmp_path / "copies")


@pytest.fixture(params=["in_folder", "on_seaweedfs", "on_seaweedfs_uncached", "on_moto"])
def place(request: pytest.FixtureRequest) -> Place:
    """Returns a place of every implementation."""
    made: Place = request.getfixturevalue(request.param)
    return made


@pytest.fixture
def store(place: Place) -> BlobStore:
    return place.store


def staged(store: BlobStore, data: bytes = DATA) -> StagedBlob:
    blob = store.stage()
    blob.write(data)
    return blob


def read(store: BlobStore, digest: str) -> bytes:
    return bytes(store.read(digest))


def opened(store: BlobStore, digest: str) -> bytes:
    with store.open(digest) as file:
        return file.read()


@pytest.mark.parametrize("data", [LARGE, DATA * 10, b"", b"x"], ids=["large", "many", "none", "one"])
def test_bytes_come_back(place: Place, data: bytes, tmp_path: Path) -> None:
    """`read` returns the whole blob, writable for tensors that share it, `open` a file, and `copy` writes one; also in
    another process, that has no copy."""
    digest = staged(place.store, data).commit()
    assert digest == digest_of(data)
    for store in (place.store, place.another()):
        assert store.read(digest) == data
        assert not store.read(digest).readonly
        assert opened(store, digest) == data
        assert store.copy(digest, tmp_path / "copy") == len(data)
        assert (tmp_path / "copy").read_bytes() == data


def test_a_blob_is_written_in_pieces(store: BlobStore) -> None:
    """A staged blob's size, digest and bytes are those written so far, before it is committed."""
    blob = store.stage()
    for piece in (b"ab", bytearray(b"c"), memoryview(b"de")):
        blob.write(piece)
    assert (blob.size, blob.digest) == (5, digest_of(b"abcde"))
    assert bytes(blob.read()) == b"abcde"
    blob.write(b"f")
    assert blob.commit() == digest_of(b"abcdef")


def test_a_blob_is_read_where_it_is_told(place: Place) -> None:
    """`read` fills the given memory once, and yields each piece to an observer."""
    digest = staged(place.store, DATA * 10).commit()
    for store in (place.store, place.another()):
        given: list[bytearray] = []
        pieces: list[bytes] = []

        def memory(nbytes: int, given: list[bytearray] = given) -> memoryview:
            given.append(bytearray(nbytes))
            return memoryview(given[0])

        data = store.read(digest, memory, lambda piece, pieces=pieces: pieces.append(bytes(piece)))  # type: ignore[misc]
        assert data.obj is given[0]
        assert len(given) == 1
        assert b"".join(pieces) == given[0] == DATA * 10
        assert len(pieces) == 3


def test_nothing_is_visible_before_it_is_committed(store: BlobStore) -> None:
    """Staged and discarded blobs cannot be read; discarding twice, or after a commit, does nothing."""
    blob = staged(store)
    for _ in range(2):
        with pytest.raises(NotFound):
            store.read(blob.digest)
        assert not store.exists(blob.digest)
        blob.discard()
    kept = staged(store)
    digest = kept.commit()
    kept.discard()
    assert store.read(digest) == DATA
    assert store.exists(digest)


def test_the_same_bytes_are_one_blob(store: BlobStore) -> None:
    """Committing the same bytes in many threads, while others read them, makes one readable blob."""
    digest = staged(store).commit()

    def again(_: int) -> memoryview:
        staged(store).commit()
        return store.read(digest)

    with ThreadPoolExecutor(8) as pool:
        assert all(data == DATA for data in pool.map(again, range(32)))
    assert [blob.digest for blob in store.listed()] == [digest]


@pytest.mark.parametrize("digest", [digest_of(b"?"), "", "sha256:", "sha256:../../etc/passwd", "sha256:" + "A" * 64])
def test_what_is_not_there(store: BlobStore, digest: str, tmp_path: Path) -> None:
    """An unknown digest, or text that is none, raises NotFound and is never used as a path."""
    for call in (store.read, store.open, lambda name: store.copy(name, tmp_path / "copy")):
        with pytest.raises(NotFound):
            call(digest)


def test_a_second_store_sees_the_first_ones_blobs(place: Place) -> None:
    """A store on the same place reads what another store has committed."""
    assert place.another().read(staged(place.store).commit()) == DATA


def test_a_listing_has_sizes_and_ages(store: BlobStore) -> None:
    """`listed` yields the size and age of every blob, and nothing that is staged."""
    digests = {staged(store, b"old").commit(): 3, staged(store, b"newer").commit(): 5}
    unfinished = staged(store, b"unfinished")
    found = list(store.listed())
    unfinished.discard()
    assert {blob.digest: blob.size for blob in found} == digests
    assert all(-1 <= blob.age < 300 for blob in found)


def test_removal_spares_what_was_committed_lately(store: BlobStore) -> None:
    """`remove` spares a blob that was committed within the last seconds, and removes one from before."""
    old, other = staged(store, b"old").commit(), staged(store, b"other").commit()
    assert store.remove([old, digest_of(b"?")], older_than=3600) == set()
    assert store.exists(old)
    in_future = -60  # as if a minute had passed
    assert store.remove([old, digest_of(b"?")], older_than=in_future) == {old}
    assert (store.exists(old), store.exists(other)) == (False, True)
    with pytest.raises(NotFound):
        store.read(old)
    assert store.remove([old], older_than=in_future) == set()


def test_many_blobs_are_removed(store: BlobStore) -> None:
    """A removal goes on beyond one batch."""
    digests = {staged(store, str(number).encode()).commit() for number in range(60)}
    assert {blob.digest for blob in store.listed()} == digests
    assert store.remove(sorted(digests), older_than=-60) == digests
    assert list(store.listed()) == []


def test_a_sound_store_is_ready(store: BlobStore) -> None:
    """`check` returns, and a sweep finds nothing to remove; the store has a name."""
    store.check()
    assert store.sweep(older_than=0) == 0
    assert store.identity


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize("read", [read, opened])
@pytest.mark.parametrize(
    "damage",
    [flipped, lambda data: data[:-1], lambda data: data + b"x", lambda _: b""],
    ids=["bit", "shorter", "longer", "empty"],
)
def test_bit_rot_is_found(
    place: Place, read: Callable[[BlobStore, str], bytes], damage: Callable[[bytes], bytes]
) -> None:
    """The store keeps damaged bytes for an operator and never returns them; committing the content again heals the
    blob."""
    store = place.store
    digest = staged(store).commit()
    place.overwrite(digest, damage(DATA))
    with pytest.raises(CorruptBlob, match="no longer match their digest") as caught:
        read(store, digest)
    assert caught.value.retry_after == 60
    with pytest.raises((NotFound, CorruptBlob)):  # a folder moves the file, a bucket keeps the object in its place
        read(store, digest)
    staged(store).commit()
    assert read(store, digest) == DATA
    assert place.quarantined(digest) == damage(DATA)
