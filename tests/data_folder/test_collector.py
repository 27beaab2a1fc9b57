"""`data_folder.collector` removes blobs that nothing names after a grace period, and reports lost ones."""

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sa

from prefix_service.blobs.folder import FolderBlobStore
from prefix_service.catalog.database import Database
from prefix_service.catalog.deletions import Deletions
from prefix_service.catalog.garbage import Garbage
from prefix_service.catalog.records import COMMAND_LINE, NewVersion
from prefix_service.catalog.retention import Retention
from prefix_service.catalog.schema import garbage
from prefix_service.catalog.tenants import Tenants
from prefix_service.data_folder.collector import Collected, Collector, Lost, collecting
from prefix_service.errors import NotFound, Unavailable
from prefix_service.prefix.references import parse_reference
from tests.catalog.conftest import HoldingCatalog
from tests.processes import eventually

HOUR = 3600.0


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    opened = Database(tmp_path / "catalog.sqlite")
    Tenants(opened).put("acme", COMMAND_LINE)
    yield opened
    opened.close()


@pytest.fixture
def blobs(tmp_path: Path) -> FolderBlobStore:
    return FolderBlobStore(tmp_path / "blobs")


@pytest.fixture
def collector(database: Database, blobs: FolderBlobStore) -> Collector:
    return Collector(Garbage(database), blobs, HOUR)


def stored(blobs: FolderBlobStore, data: bytes, hours_ago: float = 0) -> str:
    """Returns the digest of a blob that was committed so long ago."""
    staged = blobs.stage()
    staged.write(data)
    digest = staged.commit()
    moment = time.time() - hours_ago * HOUR
    os.utime(blobs.path(digest), (moment, moment))
    return digest


def published(
    database: Database, blobs: FolderBlobStore, word: str, adapter: str = "a", hours_ago: float = 9
) -> list[str]:
    """Publishes a version with two blobs of its own, committed so long ago; returns their digests."""
    digests = [stored(blobs, f"{word} {part}".encode(), hours_ago) for part in ("weights", "key_values")]
    new = NewVersion(f"sha256:{word}", "{}", None, digests[0], 9, "float32", digests[1], 9)
    HoldingCatalog(database).add_version("acme", adapter, new, COMMAND_LINE)
    return digests


def delete(database: Database, reference: str, hours_ago: float = 0) -> None:
    """Deletes a reference, dated so long ago."""
    HoldingCatalog(database).delete("acme", parse_reference(reference), COMMAND_LINE)
    while Deletions(database).remove_slice():
        pass
    with database.writing() as connection:
        since = sa.func.datetime("now", f"-{hours_ago * HOUR} seconds")
        connection.execute(sa.update(garbage).values(since=since))


def left(blobs: FolderBlobStore) -> set[str]:
    return {blob.digest for blob in blobs.listed()}


def test_what_a_version_names_stays(database: Database, blobs: FolderBlobStore, collector: Collector) -> None:
    """The collector keeps a blob that a version names, however old it is."""
    digests = published(database, blobs, "x")
    assert collector.collect() == Collected(0, 0, 0)
    assert left(blobs) == set(digests)


def test_an_orphan_goes_after_its_grace_period(blobs: FolderBlobStore, collector: Collector) -> None:
    """The collector removes a blob that no version ever named once its age in the store exceeds the grace period."""
    old, new = stored(blobs, b"old", hours_ago=2), stored(blobs, b"new", hours_ago=0.5)
    assert collector.collect() == Collected(1, 3, 0)
    assert left(blobs) == {new}
    assert old != new


@pytest.mark.parametrize(("hours_ago", "stays"), [(0, True), (0.9, True), (1.1, False)])
@pytest.mark.parametrize("reference", ["a", "a@1"])
def test_a_deletion_frees_bytes_after_the_grace_period(
    database: Database, blobs: FolderBlobStore, collector: Collector, reference: str, hours_ago: float, stays: bool
) -> None:
    """The grace period counts from the deletion, in the database's time, because readers may still need the blobs."""
    digests = published(database, blobs, "x")
    delete(database, reference, hours_ago)
    collector.collect()
    assert left(blobs) == (set(digests) if stays else set())


def test_bytes_that_another_version_names_stay(
    database: Database, blobs: FolderBlobStore, collector: Collector
) -> None:
    """The collector keeps a blob until no version of any adapter or tenant names it."""
    digests = published(database, blobs, "x", "a")
    published(database, blobs, "x", "b")
    delete(database, "a", hours_ago=2)
    assert collector.collect() == Collected(0, 0, 0)
    delete(database, "b", hours_ago=2)
    assert collector.collect().blobs == 2
    assert not left(blobs) & set(digests)


def test_what_is_published_again_is_no_garbage(
    database: Database, blobs: FolderBlobStore, collector: Collector
) -> None:
    """A deletion long ago does not remove the blobs of a new version with the same content."""
    published(database, blobs, "x")
    delete(database, "a", hours_ago=2)
    digests = published(database, blobs, "x", hours_ago=9)
    collector.collect()
    assert left(blobs) == set(digests)


def test_what_is_stored_again_just_now_stays(database: Database, blobs: FolderBlobStore, collector: Collector) -> None:
    """The collector keeps a listed blob that a running upload has just stored again."""
    digest = stored(blobs, b"x", hours_ago=2)
    listed = list(blobs.listed())
    stored(blobs, b"x")
    assert [blob.digest for blob in listed if blob.age > HOUR] == [digest]
    assert blobs.remove([digest], older_than=HOUR) == set()
    assert collector.collect() == Collected(0, 0, 0)


def test_leftovers_of_unfinished_uploads_go(blobs: FolderBlobStore, collector: Collector, tmp_path: Path) -> None:
    """The collector removes an unfinished upload after the grace period, unless a process still writes it."""
    path = tmp_path / "blobs" / "staging" / "left"
    path.touch()
    assert collector.collect().leftovers == 0
    os.utime(path, (0, 0))
    running = blobs.stage()
    assert collector.collect().leftovers == 1
    running.discard()


def test_lost_blobs_are_told(database: Database, blobs: FolderBlobStore, collector: Collector) -> None:
    """`reconcile` returns each version with lost blobs, and which of its blobs are lost."""
    lost = {word: published(database, blobs, word, word) for word in ("w", "k", "both", "sound")}
    for word, parts in (("w", [0]), ("k", [1]), ("both", [0, 1])):
        for part in parts:
            blobs.path(lost[word][part]).unlink()
    expected = [Lost("acme/w@1", True, False), Lost("acme/k@1", False, True), Lost("acme/both@1", True, True)]
    assert collector.reconcile() == expected


def test_thousands_are_collected_in_batches(blobs: FolderBlobStore, collector: Collector) -> None:
    """One collection removes 1201 blobs, which is more than a batch."""
    for number in range(1201):
        stored(blobs, str(number).encode(), hours_ago=2)
    assert collector.collect().blobs == 1201
    assert left(blobs) == set()


def test_collecting_while_everybody_publishes_and_deletes(database: Database, blobs: FolderBlobStore) -> None:
    """With half a second of grace, every version that was acknowledged and not deleted has its bytes."""
    collector, stop = Collector(Garbage(database), blobs, 0.5), threading.Event()
    collections = 0

    def collect() -> None:
        nonlocal collections
        while not stop.is_set():
            collector.collect()
            collections += 1

    def published_in_the_end(word: str, adapter: str) -> list[str]:
        while True:
            try:
                return published(database, blobs, word, adapter, hours_ago=0)
            except Unavailable:  # on a slow machine the collector takes what is half a second old and not named yet
                time.sleep(0.01)

    def publish(worker: int) -> None:
        for number in range(30):
            word = f"{number % 3}"  # the same few contents: everybody's blobs are everybody's
            digests = published_in_the_end(word, f"a{worker}")
            assert all(blobs.exists(digest) for digest in digests)
            if number % 2:
                HoldingCatalog(database).delete("acme", parse_reference(f"a{worker}"), COMMAND_LINE)

    with ThreadPoolExecutor(5) as pool:
        collecting_all = pool.submit(collect)
        for work in [pool.submit(publish, worker) for worker in range(4)]:
            work.result(180)
        eventually(lambda: collections > 1)
        stop.set()
        collecting_all.result(60)
    assert collector.reconcile() == []


def test_it_runs_in_the_background(database: Database, blobs: FolderBlobStore) -> None:
    """`collecting` removes garbage in the background while its block runs."""
    digest = stored(blobs, b"x", hours_ago=2)
    with collecting(database, blobs, grace=0, retention=Retention(audit=1, changes=1, usage=1)):
        until = time.monotonic() + 60
        while blobs.exists(digest) and time.monotonic() < until:
            time.sleep(0.05)
        assert not blobs.exists(digest)
    with pytest.raises(NotFound):
        blobs.read(digest)


def test_a_fault_in_one_task_ends_no_other(
    database: Database, blobs: FolderBlobStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A task that raises is logged with its traceback, and garbage is collected all the same."""

    def fail(_: Collector) -> list[Lost]:
        raise ZeroDivisionError

    monkeypatch.setattr(Collector, "reconcile", fail)
    test_it_runs_in_the_background(database, blobs)
    assert [record.message for record in caplog.records if record.exc_info] == ["garbage collection failed"]
