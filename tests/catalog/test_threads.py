"""`catalog.threads` and the patience of `Database`: a catalog that is locked or hangs is refused in time."""

import asyncio
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from anyio import to_thread

from prefix_service.catalog import access as module
from prefix_service.catalog import threads
from prefix_service.catalog.access import Patience
from prefix_service.catalog.database import Database
from prefix_service.catalog.tenants import Tenants
from prefix_service.catalog.threads import read_catalog, write_catalog
from prefix_service.errors import NotFound, Overloaded, ReadOnly, StorageFailed
from prefix_service.system.turns import ASKING
from tests.catalog.conftest import BY

HURRIED = Patience(reads=0.2, writes=0.2, turn=1)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "catalog.sqlite"


@pytest.fixture
def tenants(path: Path) -> Iterator[Tenants]:
    """Returns tenants, one of them made, in a database that waits for 0.2 seconds."""
    opened = Database(path, HURRIED)
    found = Tenants(opened)
    found.put("acme", BY)
    yield found
    opened.close()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Locks the file, as another program does."""
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    try:
        yield
    finally:
        other.close()


def test_a_locked_catalog_refuses_in_time_and_then_immediately(
    tenants: Tenants, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two hundred readers and writers on forty threads fail together with the first, since nobody queues for a lock.
    Once the lock and the moment of refusal are over, everything works."""
    monkeypatch.setattr(module, "_REFUSING", 60.0)

    def ask(number: int) -> str:
        with pytest.raises(StorageFailed) as refused:
            tenants.put(f"t{number}", BY) if number % 2 else tenants.require("acme")
        return refused.value.message

    with locked(path):
        began = time.monotonic()
        with ThreadPoolExecutor(40) as pool:
            said = set(pool.map(ask, range(200)))
        assert time.monotonic() - began < 20  # one after the other, they would wait for 40
    busy = "the catalog has no free connection: it is busy, or does not answer"
    held = "the catalog is locked, by another process or by a write that its disk holds up"
    assert {held} <= said <= {held, busy}
    with pytest.raises(StorageFailed):  # though nobody has the lock any more
        tenants.require("acme")
    later = time.monotonic() + 61
    monkeypatch.setattr(time, "monotonic", lambda: later)
    tenants.require("acme")
    assert tenants.put("beta", BY)


def test_what_fails_quickly_is_tried_again_immediately(tenants: Tenants) -> None:
    """After a missing tenant or a failed statement the next call is tried."""
    for _ in range(3):
        with pytest.raises(NotFound):
            tenants.require("nobody")
        with pytest.raises(StorageFailed, match="the catalog refused"), tenants._database.reading() as connection:
            connection.exec_driver_sql("SELECT * FROM nothing")
        tenants.require("acme")


def test_threads_that_hang_in_the_catalog_are_bounded(tenants: Tenants) -> None:
    """Only a bounded number of threads hang in the catalog; other calls fail within their patience, and threads are
    left for other work."""
    release, hanging = threading.Event(), threading.Barrier(module.READERS + 2)

    def hang() -> None:
        with tenants._database.reading():
            hanging.wait(60)
            release.wait(60)

    with ThreadPoolExecutor(module.READERS + 1) as pool:
        for _ in range(module.READERS + 1):
            pool.submit(hang)
        hanging.wait(60)
        with pytest.raises(StorageFailed, match="no free connection"):  # while those still hang
            tenants.require("acme")
        release.set()


async def test_a_read_that_hangs_is_given_up_and_keeps_no_other_work_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads that hang fail after the deadline, also more of them than there are threads for reads."""
    monkeypatch.setattr(threads, "DEADLINE", 0.2)
    release = threading.Event()
    asked = [asyncio.create_task(read_catalog(release.wait, 600)) for _ in range(2 * threads._READS)]
    await asyncio.sleep(0)
    assert await to_thread.run_sync(lambda: 7) == 7
    for outcome in await asyncio.gather(*asked, return_exceptions=True):
        assert isinstance(outcome, StorageFailed)
        assert outcome.message == "the catalog has not answered within 0.2 seconds"
    assert not release.is_set()
    release.set()
    monkeypatch.setattr(threads, "DEADLINE", 60)
    assert await read_catalog(int, "3") == 3


async def test_who_waits_behind_its_own_reads_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenant's reads that do not get their turn in time are refused as Overloaded, while the catalog answers."""
    monkeypatch.setattr(threads, "DEADLINE", 1.0)
    ASKING.set("acme")
    asked = [asyncio.create_task(read_catalog(time.sleep, 0.4)) for _ in range(100)]
    found = await asyncio.gather(*asked, return_exceptions=True)
    waited = [one for one in found if isinstance(one, Overloaded)]
    assert len(waited) > 50
    assert waited[0].retry_after == 1
    assert waited[0].message == (
        "this request has waited 1 seconds for its turn to read the catalog, behind other requests of tenant 'acme': "
        "send fewer at a time, and try again"
    )


@pytest.mark.parametrize("ask", [read_catalog, write_catalog])
async def test_a_tenant_that_asks_for_much_keeps_no_other_waiting(
    ask: Callable[..., Awaitable[object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hundred calls of one tenant wait in its turn on a part of the threads; calls of another tenant and of an
    operator go on."""
    monkeypatch.setattr(threads, "DEADLINE", 60)
    release = threading.Event()

    async def asked_by(tenant: str, call: Callable[[], object]) -> object:
        ASKING.set(tenant)
        return await ask(call)

    many = [asyncio.create_task(asked_by("many", lambda: release.wait(60))) for _ in range(100)]
    await asyncio.sleep(0)
    for tenant in ("other", ""):
        assert await asyncio.wait_for(asyncio.create_task(asked_by(tenant, lambda: 7)), 30) == 7
    release.set()
    assert await asyncio.gather(*many) == [True] * 100


def test_a_read_only_catalog_is_read_while_another_process_writes(tenants: Tenants, path: Path) -> None:
    """A read-only catalog shows the changes of another process, and refuses changes of its own."""
    reader = Database(path, HURRIED, read_only=True)
    tenants.put("beta", BY)
    Tenants(reader).require("beta")
    with pytest.raises(ReadOnly, match="--read-only"):
        Tenants(reader).put("gamma", BY)
    with reader.reading() as connection, pytest.raises(sqlite3.OperationalError, match="readonly"):
        connection.connection.driver_connection.execute("DELETE FROM tenants")  # type: ignore[union-attr]
    reader.close()


def test_a_read_only_catalog_is_not_migrated(path: Path) -> None:
    """A read-only catalog with an older schema or none is refused, and the message says what to do."""
    sqlite3.connect(path).close()
    with pytest.raises(StorageFailed, match=r"has an older schema \(None\), .* start one without --read-only"):
        Database(path, read_only=True)
    assert path.stat().st_size == 0


def test_a_read_only_catalog_does_not_undo_what_a_crash_left(tenants: Tenants, path: Path) -> None:
    """A read-only catalog with a crash's journal is refused with what to do; after that it can be read."""
    crashing = """
import os, sqlite3, sys
catalog = sqlite3.connect(sys.argv[1], isolation_level=None)
catalog.execute("PRAGMA cache_size=2")
catalog.execute("BEGIN IMMEDIATE")
for number in range(2000):
    catalog.execute("INSERT INTO numbers VALUES (?, ?, 1)", (f"t{number}", "a" * 100))
os._exit(0)
"""
    subprocess.run([sys.executable, "-c", crashing, str(path)], check=True)
    with pytest.raises(StorageFailed, match="a crash cut a change of the catalog short: start a service without"):
        Database(path, read_only=True)
    tenants.require("acme")
    Database(path, read_only=True).close()
