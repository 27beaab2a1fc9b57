"""A catalog on PostgreSQL in use: deadlines, lost connections and replies, notifications, locks between processes."""

import ssl
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from psycopg.pq import PGconn

from prefix_service.catalog import glances
from prefix_service.catalog.access import Patience
from prefix_service.catalog.database import Database
from prefix_service.catalog.feed import ChangeFeed
from prefix_service.catalog.postgres import BoundedConnection
from prefix_service.catalog.tenants import Tenants
from prefix_service.catalog.threads import read_catalog, write_catalog
from prefix_service.errors import InvalidInput, StorageFailed
from tests.catalog.conftest import BY
from tests.postgresql import PostgreSQL
from tests.processes import eventually

HURRIED = Patience(reads=0.3, writes=0.3, turn=5)


@pytest.fixture
def name(postgresql: PostgreSQL, template: str) -> Iterator[str]:
    name = postgresql.new_database(template)
    yield name
    postgresql.drop(name)


@pytest.fixture
def url(postgresql: PostgreSQL, name: str) -> str:
    return postgresql.url(name)


@pytest.fixture
def database(url: str) -> Iterator[Database]:
    opened = Database(url)
    yield opened
    opened.close()


@pytest.fixture
def hurried(url: str) -> Iterator[Database]:
    """Yields a database whose deadlines are so short that a slow machine misses them now and then, even to open it."""

    def opened() -> Database | None:
        with suppress(StorageFailed):
            return Database(url, HURRIED)
        return None

    found = eventually(opened)
    assert found is not None
    yield found
    found.close()


@pytest.fixture
def tenants(database: Database) -> Tenants:
    return Tenants(database)


def test_a_server_that_is_stopped_keeps_nobody(hurried: Database, postgresql: PostgreSQL) -> None:
    """Its kernel acknowledges everything, and nothing ever answers: whoever reads or writes is refused, on connections
    that exist and on new ones, and none is refused once the server goes on."""
    tenants = Tenants(hurried)
    eventually(lambda: answers(lambda: tenants.put("acme", BY)))
    eventually(lambda: answers(lambda: tenants.require("acme")))
    with postgresql.stopped():
        for _ in range(2):  # the second time on a new connection
            for call in (tenants.require, lambda name: tenants.put(name, BY)):
                with pytest.raises(StorageFailed, match="cannot be reached"):
                    call("acme")
    eventually(lambda: answers(lambda: tenants.require("acme")))
    eventually(lambda: answers(lambda: tenants.put("beta", BY)))


def answers(call: Callable[[], object]) -> bool:
    try:
        call()
    except StorageFailed:  # the failures of a moment ago are repeated for a second
        return False
    return True


def test_a_slow_statement_and_a_lock_have_deadlines(hurried: Database, database: Database, tenants: Tenants) -> None:
    """The server ends them, and says so. Where it is too slow for that, the client does, and has no reason to say."""

    def sleep() -> None:
        with hurried.reading() as connection:
            connection.exec_driver_sql("SELECT pg_sleep(60)")

    eventually(lambda: "has not answered in time" in refusal(sleep))
    tenants.put("acme", BY)
    with database.writing() as connection:
        connection.exec_driver_sql("SELECT * FROM tenants FOR UPDATE")
        eventually(lambda: "locked by another transaction" in refusal(lambda: Tenants(hurried).delete("acme", BY)))


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(StorageFailed) as refused:
        call()
    return refused.value.message


def test_a_silent_transaction_ends(hurried: Database, url: str) -> None:
    """The row that every change locks is free again some seconds after its holder was stopped, or its connection was
    cut half-open."""

    tenants = Tenants(hurried)

    def hold(silent: Database) -> None:
        with silent.writing() as connection:
            connection.execute(sa.text("SELECT id FROM catalog FOR UPDATE"))
            assert not answers(lambda: tenants.put("acme", BY))
            eventually(lambda: answers(lambda: tenants.put("acme", BY)))
            connection.execute(sa.text("SELECT 1"))

    with closing(Database(url, Patience(reads=30, writes=0.3, turn=5))) as silent, pytest.raises(StorageFailed):
        hold(silent)


def test_a_process_has_five_connections(database: Database, tenants: Tenants, postgresql: PostgreSQL) -> None:
    """And one apart, however many threads ask."""
    feed = ChangeFeed(database)
    counted = sa.text("SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()")
    most = 0
    with feed.followed(), ThreadPoolExecutor(20) as pool:
        for _ in range(5):
            list(pool.map(lambda n: tenants.put(f"t{n % 3}", BY) if n % 2 else tenants.listed("", 9), range(40)))
            with database.reading() as connection:
                most = max(most, connection.scalar(counted) or 0)
    assert 4 <= most <= 6


async def test_a_transaction_that_lost_its_connection_is_tried_again(
    tenants: Tenants, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, for reads and writes: it left nothing. So is one that came into conflict with others."""
    for failing in (
        "SELECT pg_terminate_backend(pg_backend_pid())",
        "DO $$ BEGIN RAISE USING ERRCODE = '40P01'; END $$",
    ):
        tried = 0

        def put() -> str:
            nonlocal tried
            tried += 1
            with database.writing() as connection:
                connection.exec_driver_sql("INSERT INTO tenants (name) VALUES ('acme')")
                if tried == 1:
                    connection.exec_driver_sql(failing)  # noqa: B023 - called within the turn
            return "done"

        assert await write_catalog(put) == "done"
        assert (tried, [one.name for one in tenants.listed("", 9)]) == (2, ["acme"])
        tenants.delete("acme", BY)
        tried = 0

        def read() -> str:
            nonlocal tried
            tried += 1
            with database.reading() as connection:
                connection.exec_driver_sql(failing if tried == 1 else "SELECT 1")  # noqa: B023
            return "read"

        assert await read_catalog(read) == "read"
        assert tried == 2


async def test_what_fails_twice_is_refused(database: Database) -> None:
    """A second conflict is the caller's to try again."""

    def fail() -> None:
        with database.writing() as connection:
            connection.exec_driver_sql("DO $$ BEGIN RAISE USING ERRCODE = '40001'; END $$")

    with pytest.raises(StorageFailed) as told:
        await write_catalog(fail)
    assert told.value.is_undone


@pytest.mark.parametrize("was_committed", [True, False])
@pytest.mark.parametrize("seconds", [0.0, 0.5])
async def test_a_lost_reply_to_a_commit(
    tenants: Tenants, monkeypatch: pytest.MonkeyPatch, was_committed: bool, seconds: float
) -> None:
    """The server is asked how the transaction ended, until it ends: it may notice a lost connection late. One that was
    committed succeeds, and is not made twice; another is tried again."""
    commit, lost = BoundedConnection.commit, list[threading.Timer]()

    def losing(connection: BoundedConnection) -> None:
        own_id = connection.execute("SELECT pg_current_xact_id_if_assigned()").fetchone()
        if own_id == (None,) or lost:
            commit(connection)
            return
        if was_committed:
            commit(connection)
        ended = PGconn.connect_start(b"")
        ended.finish()
        lost.append(threading.Timer(seconds, connection.pgconn.finish))
        connection.pgconn = ended
        lost[0].start()
        raise psycopg.OperationalError("server closed the connection unexpectedly")

    monkeypatch.setattr(BoundedConnection, "commit", losing)
    assert await write_catalog(tenants.put, "acme", BY) is True
    assert len(lost) == 1
    assert [one.name for one in tenants.listed("", 9)] == ["acme"]
    lost[0].join()


async def test_a_transaction_that_loses_its_connection_late_is_tried_again(url: str) -> None:
    """It may have run for long: that is no reason to refuse the next ones, as it is after waiting in vain."""
    with closing(Database(url)) as database:
        database._writes._patience = 0.0  # every transaction takes longer
        is_cut = [True, False]

        def transaction() -> str:
            with database.writing() as connection:
                if is_cut.pop(0):
                    connection.exec_driver_sql("SELECT pg_terminate_backend(pg_backend_pid())")
            return "written"

        assert await write_catalog(transaction) == "written"


def test_a_reply_that_nobody_can_look_for_is_a_failure(
    tenants: Tenants, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caller is not told that nothing happened."""

    def lose(connection: BoundedConnection) -> None:
        connection.close()
        raise psycopg.OperationalError("server closed the connection unexpectedly")

    monkeypatch.setattr(BoundedConnection, "commit", lose)
    with pytest.raises(StorageFailed) as told:
        tenants.put("acme", BY)
    assert not told.value.is_undone


def test_a_notification_leads_to_a_look(database: Database, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Changes of others are heard long before the next look."""
    monkeypatch.setattr(glances, "_POLL", 3600.0)
    feed, heard = followed(database)
    other = Database(url)
    with feed.followed():
        eventually(lambda: listens(other))
        Tenants(other).put("acme", BY)
        eventually(lambda: heard)
        Tenants(other).put("beta", BY)
        eventually(lambda: heard == ["tenant-created"] * 2)
    other.close()


def test_without_notifications_everything_is_heard(
    postgresql: PostgreSQL, name: str, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By looks alone; each once, in their order, also what was committed while the connection was cut."""
    postgresql.cut_notifications_off(name)
    database, other = Database(url), Database(url)
    feed, heard = followed(database)
    with feed.followed():
        eventually(lambda: listens(other))
        for tenant in ("acme", "beta"):
            Tenants(other).put(tenant, BY)
        eventually(lambda: len(heard) == 2)
        with other.writing() as connection:
            connection.exec_driver_sql(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        Tenants(other).delete("acme", BY)
        eventually(lambda: len(heard) == 3)
    assert heard == ["tenant-created", "tenant-created", "tenant-deleted"]
    assert feed.are_known
    for one in (database, other):
        one.close()


def followed(database: Database) -> tuple[ChangeFeed, list[str]]:
    feed, heard = ChangeFeed(database), list[str]()
    feed.listen(lambda changes: heard.extend(change.kind for change in changes))
    return feed, heard


def listens(database: Database) -> bool:
    query = (
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND query ~ '^(LISTEN|SELECT cat)'"
    )
    with database.reading() as connection:
        return bool(connection.exec_driver_sql(query).scalar_one())


def test_no_revision_is_seen_before_a_smaller_one(database: Database, url: str) -> None:
    """Two commits that interleave: the second waits for the first, and a reader in between sees neither."""
    feed, heard = followed(database)
    other = Database(url)
    first_has_revision, first_may_commit = threading.Event(), threading.Event()

    def slow_commit(_connection: Any) -> None:
        if threading.current_thread().name == "first":
            first_has_revision.set()
            first_may_commit.wait(60)

    sa.event.listen(other._writes.engine, "commit", slow_commit)
    first = threading.Thread(target=Tenants(other).put, args=("first", BY), name="first")
    second = threading.Thread(target=Tenants(other).put, args=("second", BY))
    first.start()
    first_has_revision.wait(60)
    second.start()
    feed.catch_up()
    assert heard == []
    first_may_commit.set()
    first.join(60)
    second.join(60)
    feed.catch_up()
    with database.reading() as connection:
        found = connection.exec_driver_sql("SELECT tenant FROM changes ORDER BY revision").scalars().all()
    assert found == ["first", "second"]
    assert heard == ["tenant-created"] * 2
    other.close()


def test_one_process_is_alone(database: Database, url: str) -> None:
    """Another one is told so, and enters once the first has left, or has lost its connection."""
    other = Database(url)
    with database.alone(7) as mine, other.alone(7) as its, other.alone(8) as unrelated:
        assert (mine, its, unrelated) == (True, False, True)
    with other.alone(7) as its:
        assert its
    other.close()


def test_without_psycopg(monkeypatch: pytest.MonkeyPatch) -> None:
    """The extra is named."""
    monkeypatch.setitem(sys.modules, "psycopg", None)
    monkeypatch.delitem(sys.modules, "prefix_service.catalog.postgres", raising=False)
    with pytest.raises(InvalidInput, match=r"pip install 'prefix-service\[fleet\]'"):
        Database("postgresql+psycopg://u@h/d")


def test_tls_by_the_parameters_of_the_url(postgresql: PostgreSQL, name: str, tmp_path: Path) -> None:
    """The server's certificate is verified; one of another authority is refused, and the message says so."""
    own = tmp_path / "own.pem"
    own.write_text(postgresql.authority.read_text())
    secure = f"{postgresql.tls_url(name)}&sslrootcert="
    with closing(Database(f"{secure}{own}")) as database, database.reading() as connection:
        query = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()"
        assert connection.exec_driver_sql(query).scalar_one() is True
    with pytest.raises(StorageFailed, match="certificate"):
        Database(f"{secure}{tmp_path / 'none.pem'}")
    foreign = ssl.create_default_context().get_ca_certs(binary_form=True)[0]
    (tmp_path / "foreign.pem").write_text(ssl.DER_cert_to_PEM_cert(foreign))
    with pytest.raises(StorageFailed, match="certificate verify failed"):
        Database(f"{secure}{tmp_path / 'foreign.pem'}")
