"""`api.middleware.usage_counts` counts requests within bounds, and writes the counts without loss."""

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prefix_service.api.http.served import FIRST_BYTE, SERVED, Served, note_load
from prefix_service.api.middleware import usage_counts
from prefix_service.api.middleware.usage_counts import UsageCounts
from prefix_service.catalog.changes import TenantDeleted
from prefix_service.catalog.database import Database
from prefix_service.catalog.records import COMMAND_LINE, Dimension, Principal, Use
from prefix_service.catalog.tenants import Tenants
from prefix_service.catalog.usage import UsageStore
from prefix_service.errors import StorageFailed

HOUR = usage_counts._this_hour()
PART = Served("acme", "a", 1, 20)
BY = Principal("k" * 16, "acme", "read", 1)
PLATFORM = Principal("p" * 16, None, "read")
ALL: tuple[Dimension, ...] = ("adapter", "version", "key")


class Store(UsageStore):
    """A store that keeps what is added in memory, and can fail."""

    def __init__(self) -> None:
        self.added: list[Use] = []
        self.calls = 0
        self.error: Exception | None = None

    def add(self, uses: Any) -> None:
        """Adds uses, or raises the error."""
        self.calls += 1
        if self.error is not None:
            raise self.error
        self.added += uses

    def wait_for(self, number: int) -> None:
        """Returns once so many are added."""
        while len(self.added) < number:
            time.sleep(0.01)


@pytest.fixture(autouse=True)
def one_hour(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps the hour from changing during a test."""
    monkeypatch.setattr(usage_counts, "_this_hour", lambda: HOUR)


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def counts(store: Store) -> UsageCounts:
    return UsageCounts(store.add)


def scope(*parts: Served, by: Principal = BY) -> dict[str, Any]:
    """Returns the scope of a request that has ended."""
    return {"principal": by, SERVED: parts or (PART,)}


def written(counts: UsageCounts, store: Store) -> list[tuple[Any, ...]]:
    """Writes the counts, and returns them, without their hour, in order."""
    asyncio.run(counts.write())
    found = sorted(store.added, key=lambda use: use.place)
    store.added = []
    assert all(use.hour == HOUR for use in found)
    shown = [(*use.place[1:], use.requests, use.bytes, use.cold_loads, use.prefix_tokens) for use in found]
    return [one for one in shown if one[4]]


def test_requests_add_up(counts: UsageCounts, store: Store) -> None:
    """Requests, bytes, tokens and loads are added by version and key, and written once."""
    counts.count(scope(), 200, 100)
    cold = scope()
    version: Any = type("Version", (), {"tenant": "acme", "adapter": "a", "number": 1})
    note_load(cold, version, 0.5)
    counts.count(cold, 200, 100)
    counts.count(scope(by=PLATFORM), 200, 7)
    assert written(counts, store) == [
        ("acme", "a", 1, BY.key_id, 2, 200, 1, 40),
        ("acme", "a", 1, f"platform:{PLATFORM.key_id}", 1, 7, 0, 20),
    ]
    assert written(counts, store) == []
    counts.count(scope(), 200, 1)
    assert written(counts, store) == [("acme", "a", 1, BY.key_id, 1, 1, 0, 20)]


@pytest.mark.parametrize(
    ("status", "sent", "first_byte", "tokens"),
    [(304, 0, 0, 0), (200, 0, 0, 0), (200, 9, 0, 20), (206, 9, 0, 20), (206, 9, 1, 0)],
    ids=["not modified", "HEAD", "whole", "first range", "later range"],
)
def test_tokens_are_handed_out_with_the_first_byte(
    counts: UsageCounts, store: Store, status: int, sent: int, first_byte: int, tokens: int
) -> None:
    """Tokens count only in answers that send the first byte of the body."""
    counts.count(scope() | {FIRST_BYTE: first_byte}, status, sent)
    assert written(counts, store) == [("acme", "a", 1, BY.key_id, 1, sent, 0, tokens)]


@pytest.mark.parametrize("status", [0, 404, 429, 503, 507])
def test_what_fails_is_not_counted(counts: UsageCounts, store: Store, status: int) -> None:
    """Failed requests, and those for no prefix, are not counted."""
    counts.count(scope(), status, 100)
    counts.count({"principal": BY}, 200, 100)
    counts.count({}, 200, 100)
    assert written(counts, store) == []
    assert store.calls == 0


def test_an_answer_with_several_versions(counts: UsageCounts, store: Store) -> None:
    """An answer counts for each version, and their bytes together are those of the body."""
    parts = [Served("acme", "a", 1, 30), Served("acme", "b", 7, 60), Served("beta", "c", 1, 10)]
    counts.count(scope(*parts, by=PLATFORM), 200, 1001)
    found = written(counts, store)
    assert [(use[0], use[1], use[2], use[4], use[5], use[7]) for use in found] == [
        ("acme", "a", 1, 1, 300, 30),
        ("acme", "b", 7, 1, 600, 60),
        ("beta", "c", 1, 1, 101, 10),
    ]


def test_a_tenant_with_more_than_is_counted_apart(
    counts: UsageCounts, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Uses above a tenant's bound are counted for the tenant alone, for the rest of the hour; others are not."""
    monkeypatch.setattr(usage_counts, "MOST_OF_TENANT", 2)
    for number in (1, 2, 3, 4, 3, 1):
        counts.count(scope(Served("acme", "a", number, 1)), 200, 10)
    counts.count(scope(Served("beta", "a", 1, 1), by=PLATFORM), 200, 10)
    assert [(use[0], use[1], use[2], use[4]) for use in written(counts, store)] == [
        ("acme", "", 0, 3),
        ("acme", "a", 1, 2),
        ("acme", "a", 2, 1),
        ("beta", "a", 1, 1),
    ]
    counts.count(scope(Served("acme", "a", 5, 1)), 200, 10)
    counts.count(scope(Served("acme", "a", 2, 1)), 200, 10)
    assert [use[1:3] for use in written(counts, store)] == [("", 0), ("a", 2)]
    monkeypatch.setattr(usage_counts, "MOST", 3)
    counts.count(scope(Served("gamma", "a", 1, 1), by=PLATFORM), 200, 10)
    assert [use[:3] for use in written(counts, store)] == [("gamma", "", 0)]


def test_the_next_hour(counts: UsageCounts, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next hour has its own counts and its own bound."""
    monkeypatch.setattr(usage_counts, "MOST_OF_TENANT", 1)
    counts.count(scope(), 200, 1)
    following = HOUR.replace(year=HOUR.year + 1)
    monkeypatch.setattr(usage_counts, "_this_hour", lambda: following)
    asyncio.run(counts.write())
    counts.count(scope(Served("acme", "b", 1, 1)), 200, 1)
    asyncio.run(counts.write())
    assert [(use.hour, use.adapter) for use in store.added] == [(HOUR, "a"), (following, "b")]


@pytest.mark.parametrize("error", [StorageFailed("locked"), RuntimeError("a defect")])
def test_what_cannot_be_written_is_written_later(counts: UsageCounts, store: Store, error: Exception) -> None:
    """Counts that the store refused are written once, with later ones."""
    counts.count(scope(), 200, 10)
    store.error = error
    assert written(counts, store) == []
    counts.count(scope(), 200, 10)
    assert written(counts, store) == []
    store.error = None
    assert written(counts, store) == [("acme", "a", 1, BY.key_id, 2, 20, 0, 40)]
    assert written(counts, store) == []


def test_what_waits_is_bounded(
    counts: UsageCounts, store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Waiting counts are dropped once they exceed the bound, and the log says how many requests they had."""
    monkeypatch.setattr(usage_counts, "MOST", 3)
    store.error = StorageFailed("locked")
    for number in range(1, 6):
        counts.count(scope(Served("acme", "a", number, 1)), 200, 10)
        monkeypatch.setattr(counts, "_apart_in_all", 0)
    asyncio.run(counts.write())
    assert [record.__dict__["requests"] for record in caplog.records if record.levelname == "ERROR"] == [5]
    store.error = None
    assert written(counts, store) == []


def test_without_a_store_nothing_is_kept() -> None:
    """A read-only service, which has no store, keeps no counts."""
    counts = UsageCounts(None)
    counts.count(scope(), 200, 10)
    asyncio.run(counts.write())
    assert not counts._counts
    assert not counts._taken


def test_the_end_writes_what_is_left(counts: UsageCounts, store: Store) -> None:
    """A service that stops writes the counts that are left."""

    async def run() -> None:
        async with counts.running():
            await asyncio.sleep(0)
            counts.count(scope(), 200, 10)

    asyncio.run(run())
    assert [use.requests for use in store.added] == [1]


def test_it_is_written_again_and_again(counts: UsageCounts, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A running service writes its counts repeatedly."""
    monkeypatch.setattr(usage_counts, "_PAUSE", 0.01)

    async def run() -> None:
        async with counts.running():
            for number in (1, 2):
                counts.count(scope(), 200, 10)
                await asyncio.wait_for(asyncio.to_thread(store.wait_for, number), 60)

    asyncio.run(run())
    assert len(store.added) == 2


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    opened = Database(tmp_path / "catalog.sqlite")
    yield opened
    opened.close()


def test_a_deleted_tenant(database: Database) -> None:
    """A namesake does not get what a deleted tenant used."""
    tenants, store = Tenants(database), UsageStore(database)
    counts = UsageCounts(store.add)
    tenants.put("acme", COMMAND_LINE)
    counts.count(scope(), 200, 10)
    counts.on_changes([TenantDeleted("acme")])
    counts.count(scope(), 200, 10)
    asyncio.run(counts.write())
    (use,) = store.listed("acme", ALL, limit=9)
    assert use.requests == 1
