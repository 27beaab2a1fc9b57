"""A replica collects a blob while another one, on another machine, publishes the same bytes."""

import asyncio
import os
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from unittest.mock import patch

import pytest
import sqlalchemy as sa
import torch

from prefix_service.blobs.bucket import Bucket
from prefix_service.blobs.s3 import S3BlobStore
from prefix_service.catalog.catalog import Catalog
from prefix_service.catalog.database import Database
from prefix_service.catalog.deletions import Deletions
from prefix_service.catalog.garbage import CONDEMNED, Garbage
from prefix_service.catalog.keys import Keyring
from prefix_service.catalog.records import COMMAND_LINE, Version
from prefix_service.catalog.schema import garbage
from prefix_service.data_folder.collector import Collected, Collector
from prefix_service.library.arrivals import Target
from prefix_service.library.plan import Limits
from prefix_service.library.wiring import compose
from prefix_service.prefix.config import parse_config
from prefix_service.prefix.references import parse_reference
from prefix_service.registry.registry import AdapterRegistry
from tests.admission import generous_admission
from tests.api.helpers import CONFIG, weights
from tests.fleet.starting import Engines
from tests.processes import eventually

TARGET = Target("acme", "a", COMMAND_LINE, make_tenant=True)
LIMITS = Limits(batch_size=8, sequence_length=64, upload_bytes=1 << 20)
GRACE = 1.0


class SlowBucket(Bucket):
    """A bucket whose removals are held up, as a busy network or a stopped process does."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.begun, self.may_go_on = threading.Event(), threading.Event()

    def delete(self, keys: Sequence[str]) -> None:
        self.begun.set()
        assert self.may_go_on.wait(60)
        super().delete(keys)


@dataclass
class Machine:
    """A replica's view of the fleet: connections and a blob cache of its own."""

    database: Database
    bucket: SlowBucket
    blobs: S3BlobStore
    folder: Path

    async def publish(self) -> Version:
        """Publishes the same bytes each time."""
        registry = AdapterRegistry(torch.device("cpu"), 1 << 20, 1 << 20)
        keyring = Keyring(self.database, self.folder / "key.secret")
        cases = compose(self.database, keyring, self.blobs, registry, LIMITS, generous_admission())
        async with cases.publisher.receiving(TARGET, 0) as upload:
            upload.write(weights())
            return (await cases.publisher.publish(upload, parse_config(CONFIG)))[0]

    def delete(self) -> None:
        """Deletes the adapter, long ago."""
        Catalog(self.database).delete("acme", parse_reference("a"), COMMAND_LINE)
        while Deletions(self.database).remove_slice():
            pass
        self.age(garbage.c.since, 3600)

    def age(self, column: sa.Column[datetime], seconds: float) -> None:
        """Moves a moment of all garbage back."""
        with self.database.writing() as connection:
            earlier = column - timedelta(seconds=seconds)
            connection.execute(sa.update(garbage).values({column: earlier}))

    def collect(self) -> Collected:
        """Collects garbage of a second ago."""
        return Collector(Garbage(self.database), self.blobs, GRACE).collect()


@pytest.fixture
def machines(engines: Engines, tmp_path: Path) -> Iterator[list[Machine]]:
    """Yields two machines, of which the first has published a version and deleted it long ago."""
    made = []
    environment = engines.environment(tmp_path / "secret")
    for name in "ab":
        database = Database(environment["PREFIX_CATALOG_URL"])
        with patch.dict(os.environ, environment):
            bucket = SlowBucket(environment["PREFIX_BLOBS_URL"])
        made.append(Machine(database, bucket, S3BlobStore(bucket, tmp_path / name, 1 << 20), tmp_path))
    yield made
    for machine in made:
        machine.database.close()


async def collecting(machine: Machine) -> asyncio.Task[None]:
    """Begins a collection that has decided what to remove, and has not removed it yet."""

    def collect() -> None:
        while not machine.bucket.begun.is_set():  # the bucket's times are whole seconds
            machine.collect()

    task = asyncio.create_task(asyncio.to_thread(collect))
    await asyncio.to_thread(machine.bucket.begun.wait, 60)
    return task


async def until(found: Callable[[], bool]) -> None:
    await asyncio.to_thread(eventually, found)


async def test_what_is_published_during_its_removal_stays(
    machines: list[Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A publication waits until the collector has removed the same bytes, and then stores them."""
    collector, publisher = machines
    first = await publisher.publish()
    publisher.delete()
    removal = await collecting(collector)
    asked: list[bool] = []
    hold = Catalog.hold

    def noted(catalog: Catalog, digests: Collection[str]) -> bool:
        asked.append(hold(catalog, digests))
        return asked[-1]

    monkeypatch.setattr(Catalog, "hold", noted)
    again = asyncio.create_task(publisher.publish())
    await until(lambda: False in asked or again.done())
    collector.bucket.may_go_on.set()
    await removal
    version = await again
    assert (version.weights, version.key_values) == (first.weights, first.key_values)
    assert [publisher.blobs.exists(digest) for digest in (version.weights, version.key_values)] == [True, True]
    assert collector.collect().blobs == 0


async def test_a_collector_that_never_ends_blocks_nobody_for_long(machines: list[Machine]) -> None:
    """It is killed, or stopped, between its decision and the removal: later it removes nothing any more."""
    collector, publisher = machines
    first = await publisher.publish()
    publisher.delete()
    condemned = Garbage(collector.database).condemn([first.weights, first.key_values], GRACE)
    assert condemned.digests == {first.weights, first.key_values}
    again = asyncio.create_task(publisher.publish())
    publisher.age(garbage.c.condemned, CONDEMNED)
    version = await again
    collector.bucket.may_go_on.set()
    assert collector.blobs.remove([version.weights, version.key_values], older_than=-60, within=0) == set()
    Garbage(collector.database).acquit(condemned)
    assert [publisher.blobs.exists(digest) for digest in (version.weights, version.key_values)] == [True, True]
