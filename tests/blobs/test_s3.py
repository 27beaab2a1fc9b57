"""`blobs.s3` reads, writes and refuses as it must on servers that are odd, damaged, slow or away."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import pytest

from prefix_service.blobs import bucket as bucket_module
from prefix_service.blobs.bucket import RANGE
from prefix_service.blobs.names import path_of
from prefix_service.blobs.s3 import S3BlobStore
from prefix_service.data_folder.opening import blob_store
from prefix_service.errors import (
    CorruptBlob,
    InvalidInput,
    NotFound,
    OutOfSpace,
    PrefixServiceError,
    ReadOnly,
    StorageFailed,
    Unavailable,
)
from prefix_service.settings import Settings
from prefix_service.system.failures import REMEMBERED_SECONDS, Failures
from tests.blobs.odd_server import Answer, OddServer, odd_server
from tests.blobs.places import BucketPlace
from tests.blobs.test_contract import DATA, digest_of, flipped, opened, staged
from tests.processes import eventually
from tests.seaweedfs import KEYS

LARGE = bytes(range(251)) * (2 * RANGE // 251 + 1000)
"""Three ranges."""


@pytest.fixture
def place(moto: str, tmp_path: Path) -> BucketPlace:
    return BucketPlace(moto, tmp_path / "copies")


@pytest.fixture
def odd(moto: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[OddServer]:
    """Yields a proxy, whose failures are not remembered and are retried soon."""
    monkeypatch.setattr(bucket_module, "_PAUSE", 0.0)
    monkeypatch.setattr(bucket_module, "_RETRYING", timedelta(seconds=0.5))
    with odd_server(moto) as running:
        yield running


@pytest.fixture
def store(place: BucketPlace, odd: OddServer, tmp_path: Path) -> S3BlobStore:
    """Returns a store on the place, behind the proxy, without copies."""
    return place.another(tmp_path / "other", odd.url)


def body_of_get(answer: Answer) -> bool:
    return (
        answer.method == "GET" and answer.status in (200, 206) and "xml" not in answer.headers.get("Content-Type", "")
    )


def test_a_large_blob_goes_in_parts_and_comes_in_ranges(store: S3BlobStore, odd: OddServer) -> None:
    """A blob of several ranges is uploaded in parts, read in ranges, and then read from its copy without a request."""
    digest = staged(store, LARGE).commit()
    assert sum("partNumber" in asked for asked in odd.asked) == 3
    store._drop(digest)
    odd.asked.clear()
    assert store.read(digest) == LARGE
    assert len(odd.asked) == 3
    odd.asked.clear()
    assert store.read(digest) == LARGE
    assert opened(store, digest) == LARGE
    assert odd.asked == []


@pytest.mark.parametrize("read", [S3BlobStore.read, opened])
@pytest.mark.parametrize("bad", [flipped(DATA), DATA + b"x", b""], ids=["bit", "longer", "empty"])
def test_a_damaged_copy_is_replaced(
    place: BucketPlace, read: Callable[[S3BlobStore, str], object], bad: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """A copy that does not match is logged and never returned: the blob comes from the bucket, and is copied again."""
    digest = staged(place.store).commit()
    place.cached(digest).write_bytes(bad)
    for _ in range(2):
        assert read(place.store, digest) == DATA
    assert place.cached(digest).read_bytes() == DATA
    logged = [record.message for record in caplog.records if record.name == "prefix_service"]
    assert logged == ["a cached blob is damaged, and is read again"]


@pytest.mark.parametrize("status", [409, 412, 501])
def test_a_server_that_replaces_nothing(store: S3BlobStore, place: BucketPlace, odd: OddServer, status: int) -> None:
    """A refused write of a blob that is there already succeeds; of one that is not, it is an error, and nothing is
    visible."""
    digest = staged(place.store).commit()
    odd.refuses("PUT", status)
    assert staged(store).commit() == digest
    other = staged(store, b"other")
    with pytest.raises(Unavailable, match=f"cannot store .* answers {status}"):
        other.commit()
    other.discard()
    assert not store.exists(digest_of(b"other"))


def test_wrong_etags_do_not_matter(store: S3BlobStore, odd: OddServer) -> None:
    """An ETag is no digest: another one in each answer about an object changes nothing."""
    numbers = iter(range(1000))

    def oddity(answer: Answer) -> None:
        if answer.method in ("GET", "HEAD"):
            answer.headers["ETag"] = f'"wrong-{next(numbers)}"'

    odd.oddity = oddity
    digest = staged(store, LARGE).commit()
    store._drop(digest)
    assert store.read(digest) == LARGE
    assert store.remove([digest], older_than=-60) == {digest}


def test_a_server_that_asks_for_fewer_requests(store: S3BlobStore, odd: OddServer) -> None:
    """`503 SlowDown` is retried; if it stays, it is Unavailable, and no damage."""
    digest = staged(store).commit()
    store._drop(digest)
    odd.refuses("GET", 503, "SlowDown", times=2)
    assert store.read(digest) == DATA
    store._drop(digest)
    odd.refuses("GET", 503, "SlowDown")
    with pytest.raises(Unavailable, match="503 SlowDown") as caught:
        store.read(digest)
    assert type(caught.value) is Unavailable
    odd.refuses("GET", 503, times=0)
    assert store.read(digest) == DATA


@pytest.mark.parametrize("data", [DATA, LARGE], ids=["one-range", "ranges"])
def test_bodies_that_break_off_are_read_again(store: S3BlobStore, odd: OddServer, data: bytes) -> None:
    """A body that ends early, at whatever range, is asked for again; if it always does, that is Unavailable."""
    digest = staged(store, data).commit()
    store._drop(digest)
    left = 2

    def cut(answer: Answer) -> None:
        nonlocal left
        if body_of_get(answer) and left:
            left -= 1
            answer.body = answer.body[: len(answer.body) // 2]

    odd.oddity = cut
    assert store.read(digest) == data
    store._drop(digest)
    left = 1_000_000
    with pytest.raises(Unavailable, match=r"the answer of .* broke off") as caught:
        store.read(digest)
    assert type(caught.value) is Unavailable
    left = 0
    assert opened(store, digest) == data


def test_a_bit_that_flips_on_the_way_is_no_damage(
    store: S3BlobStore, place: BucketPlace, odd: OddServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Bytes that arrive damaged once are read again; an observer sees the sound ones alone; nothing is put aside."""
    digest = staged(store, LARGE).commit()
    store._drop(digest)
    left = 1

    def flip(answer: Answer) -> None:
        nonlocal left
        if body_of_get(answer) and left:
            left -= 1
            answer.body = flipped(answer.body)

    odd.oddity = flip
    seen: list[bytes] = []
    assert store.read(digest, observer=lambda piece: seen.append(bytes(piece))) == LARGE
    assert b"".join(seen) == LARGE
    assert [record.message for record in caplog.records if record.name == "prefix_service"] == [
        "a blob arrived damaged, and is read again"
    ]
    assert place.names() == {path_of(digest)}


def test_damage_that_cannot_be_copied_is_not_served(store: S3BlobStore, place: BucketPlace, odd: OddServer) -> None:
    """A server that cannot copy has the damaged object alone; it is never served, and a commit heals it."""
    digest = staged(store).commit()
    place.overwrite(digest, flipped(DATA))
    store._drop(digest)
    odd.refuses("PUT", 501, "NotImplemented")
    for _ in range(2):
        with pytest.raises(CorruptBlob):
            store.read(digest)
    assert place.names() == {path_of(digest)}
    odd.refuses("PUT", 501, times=0)
    staged(store).commit()
    assert store.read(digest) == DATA


def test_a_damaged_object_is_read_once_in_a_moment(
    store: S3BlobStore, place: BucketPlace, odd: OddServer, tmp_path: Path
) -> None:
    """Many reads of a damaged object ask the server once in a moment; a commit ends the moment, and so does removal."""
    digest, now = staged(store).commit(), 100.0
    store._failures = Failures(lambda: now)
    for heal in (lambda: staged(store).commit(), lambda: store.remove([digest], older_than=-3600)):
        place.overwrite(digest, flipped(DATA))
        store._drop(digest)
        for _ in range(2):
            odd.asked.clear()
            for read in (store.read, store.open, lambda digest: store.copy(digest, tmp_path / "copy")):
                with pytest.raises(CorruptBlob, match="publish the same files again"):
                    read(digest)
            assert sum(asked.startswith("GET") for asked in odd.asked) == 2
            now += REMEMBERED_SECONDS
        with pytest.raises(CorruptBlob):
            store.read(digest)
        heal()
        if store.exists(digest):
            assert store.read(digest) == DATA
    with pytest.raises(NotFound):
        store.read(digest)


@pytest.mark.parametrize("at", range(5))
def test_a_commit_elsewhere_outlives_damage(
    store: S3BlobStore, place: BucketPlace, odd: OddServer, tmp_path: Path, at: int
) -> None:
    """Another machine commits the content while this one finds it damaged. Before whichever request of this one that
    happens, or after all, the commit stays."""
    elsewhere = place.another(tmp_path / "elsewhere")
    digest = staged(store).commit()
    place.overwrite(digest, flipped(DATA))
    store._drop(digest)
    odd.asked.clear()

    def commit_meanwhile(_method: str, _path: str) -> None:
        if len(odd.asked) == at + 1:
            staged(elsewhere).commit()

    odd.refusal = commit_meanwhile
    try:
        assert store.read(digest) == DATA
    except CorruptBlob:
        if len(odd.asked) <= at:
            staged(elsewhere).commit()
    odd.refusal = lambda _method, _path: None
    store._failures = Failures()  # a moment later
    for each in (store, place.another(tmp_path / "third")):
        assert each.read(digest) == DATA


@pytest.mark.parametrize(
    ("status", "code", "error", "advice"),
    [
        (404, "NoSuchBucket", StorageFailed, "make the bucket 'tests', or correct PREFIX_BLOBS_URL"),
        (403, "InvalidAccessKeyId", StorageFailed, "look at AWS_ACCESS_KEY_ID"),
        (403, "SignatureDoesNotMatch", StorageFailed, "look at AWS_ACCESS_KEY_ID"),
        (400, "ExpiredToken", StorageFailed, "AWS_SESSION_TOKEN"),
        (401, "", StorageFailed, "look at AWS_ACCESS_KEY_ID"),
        (403, "AccessDenied", StorageFailed, "let the key read, write, delete and list"),
        (403, "", StorageFailed, "let the key read, write, delete and list"),
        (403, "RequestTimeTooSkewed", StorageFailed, "clock is wrong"),
        (301, "PermanentRedirect", StorageFailed, "set AWS_REGION"),
        (400, "AuthorizationHeaderMalformed", StorageFailed, "set AWS_REGION"),
        (507, "", OutOfSpace, "has no room"),
        (400, "Unheard", Unavailable, "answers 400 Unheard"),
    ],
)
def test_refusals_say_what_to_do(
    store: S3BlobStore,
    odd: OddServer,
    caplog: pytest.LogCaptureFixture,
    status: int,
    code: str,
    error: type[PrefixServiceError],
    advice: str,
) -> None:
    """Each refusal is an error of its own with advice, for reads and checks alike, and never shows a key."""
    odd.refuses("GET", status, code)
    for call in (lambda: store.read(digest_of(DATA)), store.check):
        with pytest.raises(error, match=advice) as caught:
            call()
        assert type(caught.value) is error
        shown = f"{caught.value} {caught.value.__cause__} {caught.value.__context__} {caplog.text}"
        assert KEYS["AWS_ACCESS_KEY_ID"] not in shown
        assert KEYS["AWS_SECRET_ACCESS_KEY"] not in shown


@pytest.mark.parametrize("status", [301, 307])
def test_a_redirect_is_given_no_key(
    place: BucketPlace, odd: OddServer, tmp_path: Path, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that redirects elsewhere leads to no request with a key's id or a signature there, and a blob is not
    stored there. obstore cannot be told to refuse redirects."""
    monkeypatch.setenv("AWS_SESSION_TOKEN", "the-token")
    store = place.another(tmp_path / "other", odd.url)
    blob = staged(store)
    with odd_server(place.endpoint) as elsewhere:

        def redirect(answer: Answer) -> None:
            answer.status, answer.headers["Location"] = status, f"{elsewhere.url}{answer.path}"

        odd.oddity = redirect
        with pytest.raises(PrefixServiceError):
            store.read(blob.digest)
        with pytest.raises(PrefixServiceError):
            blob.commit()
    blob.discard()
    assert any("Credential=" in fields.get("authorization", "") for fields in odd.fields)
    shown = str(elsewhere.fields).lower()
    assert "authorization" not in shown
    assert KEYS["AWS_ACCESS_KEY_ID"].lower() not in shown
    assert not any(asked.startswith("PUT") for asked in elsewhere.asked)


def test_a_missing_bucket_is_no_missing_blob(store: S3BlobStore, odd: OddServer) -> None:
    """A HEAD has no body that says what is missing, so `exists` asks again; a blob is missing if the bucket is not."""
    assert not store.exists(digest_of(DATA))
    odd.refusal = lambda method, _: (404, "NoSuchBucket") if method == "GET" else (404, "")
    with pytest.raises(StorageFailed, match="make the bucket"):
        store.exists(digest_of(DATA))


def test_a_server_that_is_away_is_not_waited_for_twice(place: BucketPlace, tmp_path: Path) -> None:
    """After one request without an answer, the others fail immediately; a copy is served all the while."""
    digest = staged(place.store).commit()
    with odd_server(place.endpoint) as gone:
        store = place.another(endpoint=gone.url)
    with pytest.raises(Unavailable, match=r"the blob store 127.0.0.1:\d+ is away \(it refuses connections\)"):
        store.read(digest_of(b"?"))
    began = time.monotonic()
    for _ in range(50):
        with pytest.raises(Unavailable, match="is away"):
            store.read(digest_of(b"?"))
    assert time.monotonic() - began < 30  # the first took its retries
    with pytest.raises(Unavailable, match=r"cannot list the blobs: the blob store .* is away"):
        list(store._bucket.listed())
    assert store.read(digest) == DATA


def test_a_silent_server_is_unavailable(
    store: S3BlobStore, place: BucketPlace, odd: OddServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A server that accepts a request and says nothing is given up after the deadline."""
    digest = staged(store).commit()
    monkeypatch.setattr(bucket_module, "_STALLED", timedelta(seconds=0.3))
    monkeypatch.setattr(bucket_module, "_QUICK", timedelta(seconds=0.3))
    silent = place.another(tmp_path / "silent", odd.url)
    answers = threading.Event()
    odd.oddity = lambda _: answers.wait(60)
    for call in (lambda: silent.read(digest), silent.check):
        with pytest.raises(Unavailable, match="is away"):
            call()
    answers.set()

    def answers_in_time() -> bool:
        with suppress(Unavailable):  # a slow machine may need longer
            return bool(silent.read(digest) == DATA)
        return False

    eventually(answers_in_time)


def test_many_readers_cause_one_read(store: S3BlobStore, odd: OddServer) -> None:
    """Threads that read one blob wait for the first one's copy."""
    digest = staged(store).commit()
    store._drop(digest)
    odd.asked.clear()
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda _: store.read(digest) == DATA, range(16)))
        assert all(pool.map(lambda _: opened(store, digest) == DATA, range(16)))
    assert len(odd.asked) == 1


def test_a_blob_that_is_committed_meanwhile_is_not_removed(place: BucketPlace, odd: OddServer, tmp_path: Path) -> None:
    """`remove` leaves a digest that a commit on this machine holds."""
    store = place.another(endpoint=odd.url)
    digest = staged(store).commit()
    begun, goes_on = threading.Event(), threading.Event()

    def hold(answer: Answer) -> None:
        if answer.method == "PUT" and path_of(digest) in answer.path:
            begun.set()
            goes_on.wait(60)

    odd.oddity = hold
    with ThreadPoolExecutor(1) as pool:
        commit = pool.submit(staged(store).commit)
        assert begun.wait(60)
        assert place.store.remove([digest], older_than=-60) == set()
        goes_on.set()
        assert commit.result(60) == digest
    assert place.store.remove([digest], older_than=-60) == {digest}


def test_a_read_only_store_changes_nothing(place: BucketPlace, tmp_path: Path) -> None:
    """It reads, makes no folder, and neither stages nor puts damaged objects aside."""
    digest = staged(place.store).commit()
    store = place.another(tmp_path / "none", read_only=True)
    assert store.read(digest) == DATA
    assert opened(store, digest) == DATA
    with pytest.raises(ReadOnly):
        store.stage()
    place.overwrite(digest, b"bad")
    with pytest.raises(CorruptBlob):
        store.read(digest)
    assert place.names() == {path_of(digest)}
    assert not (tmp_path / "none").exists()


def test_a_full_disk_keeps_no_copies(place: BucketPlace, tiny_disk: Path) -> None:
    """Reading goes on without a copy; a file that needs room is OutOfSpace, and leaves nothing behind."""
    digest = staged(place.store, DATA * 10).commit()
    folder = tiny_disk / "copies"
    store = place.another(folder)
    assert store.read(digest) == DATA * 10
    with pytest.raises(OutOfSpace, match=f"cannot keep a copy of blob {digest}: No space left"):
        store.open(digest)
    assert list((folder / "staging").iterdir()) == []


def test_a_failed_copy_leaves_no_file(place: BucketPlace, tmp_path: Path) -> None:
    """`copy` removes what it has written of a damaged or missing blob."""
    digest = staged(place.store).commit()
    place.overwrite(digest, b"bad")
    for error in (CorruptBlob, NotFound):
        with pytest.raises(error):
            place.store.copy(digest, tmp_path / "copy")
        assert not (tmp_path / "copy").exists()
        place.store.remove([digest], older_than=-3600)


def test_a_store_has_an_identity(place: BucketPlace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The identity names bucket, path and server, and nothing secret that the address may hold."""
    host = place.endpoint.removeprefix("http://")
    assert place.store.identity == f"s3://tests/{place.path}@{host}"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://user:secret@objects.example.org/")
    assert bucket_module.Bucket("s3://tests/a/").identity == "s3://tests/a@objects.example.org"
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    assert bucket_module.Bucket("s3://tests").identity == "s3://tests/@s3.eu-central-1.amazonaws.com"


def test_an_authoritys_file_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """AWS_CA_BUNDLE must name a file."""
    monkeypatch.setenv("AWS_CA_BUNDLE", "/nowhere.pem")
    with pytest.raises(InvalidInput, match=r"AWS_CA_BUNDLE=/nowhere\.pem cannot be read: No such file"):
        bucket_module.Bucket("s3://tests")


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without obstore, the setting says what to install."""
    monkeypatch.delitem(sys.modules, "prefix_service.blobs.s3")
    monkeypatch.delitem(sys.modules, "prefix_service.blobs.bucket")
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(InvalidInput, match=r"needs obstore: pip install 'prefix-service\[fleet\]'"):
        blob_store(Settings(data_dir=tmp_path, blobs_url="s3://bucket"))
