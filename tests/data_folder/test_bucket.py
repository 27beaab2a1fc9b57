"""A service whose blobs are in a bucket: publishing, reading, damage, deletion, and an S3 server that is away."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import obstore
import pytest
from obstore.store import S3Store

from prefix_service.blobs.folder import FolderBlobStore
from prefix_service.blobs.names import path_of
from prefix_service.catalog.catalog import Catalog
from prefix_service.catalog.database import Database
from prefix_service.data_folder.backup import back_up
from prefix_service.data_folder.opening import blob_folder, blob_store, cache_folder, catalog_file, opened
from prefix_service.errors import StorageFailed
from prefix_service.prefix.references import parse_reference
from prefix_service.settings import Settings
from tests.api.helpers import accepted, problem, upload, versions_path, weights
from tests.blobs.places import objects
from tests.commands import PREFIX_SERVICE
from tests.conftest import Server, _started, free_port, running_server
from tests.processes import eventually
from tests.seaweedfs import KEYS, SeaweedFS

URL = "s3://tests/of/a-service"


@dataclass
class Stored:
    """A published version: its path, what was uploaded, its prefix, and the digests of its two blobs."""

    path: str
    uploaded: bytes
    prefix: bytes
    weights: str
    key_values: str


@pytest.fixture(scope="module")
def bucket(seaweedfs: SeaweedFS) -> S3Store:
    """Returns the objects of the service."""
    obstore.put(objects(seaweedfs.url), "made", b"the bucket")
    return objects(seaweedfs.url, URL.removeprefix("s3://tests/"))


@pytest.fixture(scope="module")
def environment(seaweedfs: SeaweedFS) -> dict[str, str]:
    return seaweedfs.environment | {"PREFIX_BLOBS_URL": URL, "PREFIX_GARBAGE_GRACE": "1"}


@pytest.fixture(scope="module")
def serving(bucket: S3Store, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running_server(tmp_path_factory.mktemp("bucket") / "data", environment=environment) as running:
        yield running


def publish(server: Server, adapter: str, seed: int) -> Stored:
    sent = weights(seed)
    client = server.client()
    answer = accepted(lambda: upload(client, "acme", adapter, file=sent))
    assert answer.status_code == 201, answer.text
    where = answer.headers["Location"]
    prefix = accepted(lambda: client.get(f"{where}/prefix"))
    assert prefix.status_code == 200, prefix.text
    database = Database(catalog_file(server.data_dir), read_only=True)
    try:
        version = Catalog(database).resolve("acme", parse_reference(where.rpartition("/")[2]))
    finally:
        database.close()
    return Stored(where, sent, prefix.content, version.weights, version.key_values)


def copy_of(server: Server, digest: str) -> Path:
    """Returns the path of a blob's local copy."""
    return cache_folder(server.data_dir) / path_of(digest)


def names(bucket: S3Store) -> set[str]:
    return {each["path"] for page in obstore.list(bucket) for each in page}


def test_a_version_is_in_the_bucket(serving: Server, bucket: S3Store) -> None:
    """Both of its blobs are objects, named as in a folder; the data folder has copies, and no blobs of its own."""
    stored = publish(serving, "first", 1)
    assert {path_of(stored.weights), path_of(stored.key_values)} <= names(bucket)
    assert obstore.get(bucket, path_of(stored.weights)).bytes() == stored.uploaded
    assert copy_of(serving, stored.key_values).exists()
    assert not blob_folder(serving.data_dir).exists()
    assert serving.client().get(f"{stored.path}/parameters").content == stored.uploaded


def test_a_damaged_copy_heals_itself(serving: Server, bucket: S3Store) -> None:
    """A copy whose bytes changed is never served: the blob is read from the bucket again, and copied again."""
    stored = publish(serving, "copied", 2)
    copy_of(serving, stored.weights).write_bytes(b"damaged")
    for _ in range(2):
        assert serving.client().get(f"{stored.path}/parameters").content == stored.uploaded
    assert copy_of(serving, stored.weights).read_bytes() == stored.uploaded
    assert f"quarantine/{stored.weights.removeprefix('sha256:')}" not in names(bucket)


def test_damaged_objects_are_put_aside(serving: Server, bucket: S3Store) -> None:
    """Damaged keys and values are encoded again; damaged weights are `corrupt-blob` until they are published again."""
    client, stored = serving.client(), publish(serving, "damaged", 3)
    for digest in (stored.key_values, stored.weights):
        obstore.put(bucket, path_of(digest), b"damaged")
        copy_of(serving, digest).unlink()
    problem(client.get(f"{stored.path}/parameters"), 503, "corrupt-blob")
    quarantined = f"quarantine/{stored.weights.removeprefix('sha256:')}"
    assert obstore.get(bucket, quarantined).bytes() == b"damaged"
    assert accepted(lambda: upload(client, "acme", "damaged", file=stored.uploaded)).status_code == 200
    assert client.get(f"{stored.path}/parameters").content == stored.uploaded
    assert client.delete(f"{stored.path}/residency").status_code < 300
    assert client.get(f"{stored.path}/prefix").content == stored.prefix


def test_deleted_blobs_leave_the_bucket(serving: Server, bucket: S3Store) -> None:
    """The collector removes the objects and the copies of a deleted adapter, and those of others stay."""
    kept, stored = publish(serving, "kept", 4), publish(serving, "deleted", 5)
    assert serving.client().delete(versions_path("acme", "deleted").removesuffix("/versions")).status_code == 204
    of_deleted = {path_of(stored.weights), path_of(stored.key_values)}
    eventually(lambda: not of_deleted & names(bucket))
    eventually(lambda: not copy_of(serving, stored.weights).exists())
    assert {path_of(kept.weights), path_of(kept.key_values)} <= names(bucket)


def test_a_backup_is_a_data_folder(
    serving: Server, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`backup` copies blobs out of the bucket, verified, into a folder that needs none."""
    stored = publish(serving, "saved", 6)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    done = back_up(Settings(data_dir=serving.data_dir), tmp_path / "backup", lambda _: None)
    assert done.lost == []
    assert FolderBlobStore(blob_folder(tmp_path / "backup")).read(stored.weights) == stored.uploaded


@contextlib.contextmanager
def live_server(data_dir: Path, environment: dict[str, str]) -> Iterator[Server]:
    """Runs a service that lives, and need not be ready, until the block ends."""
    url = f"http://127.0.0.1:{free_port()}"
    log, port = data_dir / "again.log", url.rpartition(":")[2]
    arguments = ["serve", "--port", port, "--data-dir", str(data_dir)]
    process = _started(PREFIX_SERVICE, arguments, log, environment)
    server = Server(url, data_dir, (data_dir / "bootstrap.key").read_text().strip(), process, log)
    try:
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(httpx.TransportError):
                if server.client("").get("/livez").status_code == 200:
                    break
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield server
    finally:
        server.stop()


def test_a_service_starts_while_the_bucket_is_away(
    seaweedfs: SeaweedFS, bucket: S3Store, environment: dict[str, str], tmp_path: Path
) -> None:
    """It serves what it has copies of; the rest, and publishing, is 503 `unavailable` until the bucket is back. No key
    is ever shown."""
    data_dir, environment = tmp_path / "data", environment | {"PREFIX_BLOBS_URL": "s3://tests/of/another-service"}
    with running_server(data_dir, environment=environment) as server:
        copied, uncopied = publish(server, "copied", 7), publish(server, "uncopied", 8)
    for digest in (uncopied.weights, uncopied.key_values):
        copy_of(server, digest).unlink()
    with contextlib.ExitStack() as away:
        away.enter_context(seaweedfs.away())
        with live_server(data_dir, environment) as server:
            client = server.client()
            assert client.get(f"{copied.path}/prefix").content == copied.prefix
            assert client.get(f"{copied.path}/parameters").content == copied.uploaded
            answers = [client.get(f"{uncopied.path}/prefix"), client.get(f"{uncopied.path}/parameters")]
            answers += [upload(client, "acme", "new", file=weights(9))]
            details = [problem(answer, 503, "unavailable")["detail"] for answer in answers]
            assert all("is away" in detail for detail in details)
            # One check after another waits for the bucket, and all of them together for two seconds at most.
            eventually(lambda: "is away" in problem(client.get("/readyz"), 503)["detail"])
            away.close()

            def is_back() -> bool:
                return client.get(f"{uncopied.path}/prefix").content == uncopied.prefix

            eventually(is_back)
            eventually(lambda: client.get("/readyz").status_code == 200)
            # SeaweedFS reads before it has a volume to write to.
            eventually(lambda: upload(client, "acme", "new", file=weights(9)).status_code == 201)
    log = server.log.read_text()
    assert "the blob store is away" in log
    assert [key for key in (KEYS["AWS_ACCESS_KEY_ID"], KEYS["AWS_SECRET_ACCESS_KEY"]) if key in log] == []


@pytest.mark.parametrize(
    ("change", "advice"),
    [
        (
            {"PREFIX_BLOBS_URL": "s3://no-such-bucket/a"},
            "make the bucket 'no-such-bucket', or correct PREFIX_BLOBS_URL",
        ),
        ({"AWS_ACCESS_KEY_ID": "another"}, "403 InvalidAccessKeyId: look at AWS_ACCESS_KEY_ID"),
        ({"AWS_SECRET_ACCESS_KEY": "another"}, "403 SignatureDoesNotMatch: look at AWS_ACCESS_KEY_ID"),
    ],
)
def test_a_service_does_not_start_on_a_bucket_that_refuses(
    bucket: S3Store,
    environment: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    change: dict[str, str],
    advice: str,
) -> None:
    """A bucket that is missing, or a wrong key, is an error at the start that says what to do."""
    for name, value in (environment | change).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(StorageFailed, match=advice), opened(Settings(data_dir=tmp_path / "data")):
        pass


def test_a_store_of_each_kind(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The setting chooses the store, and each has an identity of its own."""
    first = blob_store(Settings(data_dir=tmp_path)).identity
    assert first.startswith("folder ")
    assert blob_store(Settings(data_dir=tmp_path)).identity == first
    assert blob_store(Settings(data_dir=tmp_path / "other")).identity != first
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert blob_store(Settings(data_dir=tmp_path)).identity.startswith(f"{URL}@127.0.0.1:")
