"""`catalog.replicas`: who lives, by the database's clock."""

from datetime import timedelta

import sqlalchemy as sa

from prefix_service.catalog.database import Database
from prefix_service.catalog.records import Replica, Serving
from prefix_service.catalog.replicas import Replicas
from prefix_service.catalog.schema import replicas


def serving(revision: int = 1, address: str | None = None) -> Serving:
    return Serving(address, "1.0", revision, adapters=2, device_bytes=3 << 40, host_bytes=4)


def age(database: Database, replica: str, seconds: float) -> None:
    """Lets the last sign of life of a replica be so long ago."""
    with database.writing() as connection:
        seen = connection.scalars(sa.select(replicas.c.seen).where(replicas.c.replica == replica)).one()
        connection.execute(
            sa.update(replicas).where(replicas.c.replica == replica).values(seen=seen - timedelta(seconds=seconds))
        )


def test_replicas_are_counted_and_listed_with_their_processes(database: Database) -> None:
    """Bytes and adapters of a replica's processes are added; its revision is that of the slowest."""
    first, worker, second = Replicas(database, "a"), Replicas(database, "a"), Replicas(database, "b")
    assert [one.beat(serving(7)) for one in (first, worker, second)] == [1, 1, 2]
    assert worker.beat(serving(9, "http://a")) == 2
    one, other = by_id(first)
    assert (one.id, other.id) == ("a", "b")
    assert one.serving == Serving("http://a", "1.0", 7, 4, 6 << 40, 8)
    assert one.started <= one.seen
    worker.leave()
    first.leave()
    assert [found.id for found in second.listed()] == ["b"]
    assert second.beat(serving()) == 1


def by_id(asked: Replicas) -> list[Replica]:
    return sorted(asked.listed(), key=lambda found: found.id)


def test_a_replica_that_is_silent_does_not_live(database: Database) -> None:
    """It does again with its next sign of life; its row goes after minutes."""
    silent, other = Replicas(database, "silent"), Replicas(database, "other")
    silent.beat(serving())
    age(database, "silent", 20)
    assert other.beat(serving()) == 1
    assert [found.id for found in other.listed()] == ["other"]
    assert silent.beat(serving()) == 2
    age(database, "silent", 600)
    other.beat(serving())
    with database.reading() as connection:
        assert connection.scalars(sa.select(replicas.c.replica)).all() == ["other"]
