"""`api.middleware.revisions` lets a process that lags behind catch up before it answers, or say that it cannot."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.types import Receive, Scope, Send

from prefix_service.api.http.opaque import Revisions
from prefix_service.api.middleware.revisions import RevisionMiddleware
from prefix_service.catalog import threads
from prefix_service.catalog.database import Database
from prefix_service.catalog.feed import ChangeFeed
from prefix_service.catalog.records import Principal
from prefix_service.catalog.tenants import Tenants
from prefix_service.errors import InvalidRequest, Unavailable
from prefix_service.library import following
from prefix_service.library.following import Following
from tests.catalog.conftest import BY

pytestmark = pytest.mark.anyio
CALLER = Principal("k", "acme", "read", 7)


class Lagging:
    """A process that does not follow the catalog, behind the middleware; another one writes."""

    def __init__(self, folder: Path) -> None:
        self.database, self.other = (Database(folder / "catalog.sqlite") for _ in range(2))
        self.feed = ChangeFeed(self.database)
        self.revisions = Revisions(lambda purpose: purpose.encode().ljust(32))
        self._middleware = RevisionMiddleware(self._app, Following(self.feed, "0" * 32), self.revisions)
        self.answered: list[int] = []

    async def _app(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.answered.append(self.feed.revision)

    async def ask(self, wanted: str) -> None:
        async def nothing(*_: object) -> dict[str, object]:
            raise AssertionError

        headers = [(b"prefix-min-revision", wanted.encode())]
        await self._middleware({"method": "GET", "headers": headers, "principal": CALLER}, nothing, nothing)  # type: ignore[arg-type]


@pytest.fixture
def lagging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lagging]:
    monkeypatch.setattr(following, "_PATIENCE", 60.0)  # what is waited for here comes, on a slow machine too
    monkeypatch.setattr(threads, "DEADLINE", 60.0)
    made = Lagging(tmp_path)
    yield made
    made.database.close()
    made.other.close()


async def test_a_read_finds_what_was_written_elsewhere(lagging: Lagging) -> None:
    """The process catches up before it answers; one that knows enough asks nothing."""
    Tenants(lagging.other).put("acme", BY)
    await lagging.ask(lagging.revisions.text(CALLER, 0))
    await lagging.ask(lagging.revisions.text(CALLER, 1))
    assert lagging.answered == [0, 1]


async def test_a_revision_that_is_not_there_yet(lagging: Lagging) -> None:
    """A revision that the catalog lacks raises Unavailable, so that the client retries."""
    with pytest.raises(Unavailable, match="does not know the changes up to Prefix-Min-Revision yet"):
        await lagging.ask(lagging.revisions.text(CALLER, 1))
    assert lagging.answered == []


async def test_a_catalog_that_is_away(lagging: Lagging) -> None:
    """If the process knows too little and cannot read the catalog, it raises Unavailable."""
    with lagging.other.writing() as connection:
        connection.exec_driver_sql("ALTER TABLE changes RENAME TO away")
    with pytest.raises(Unavailable, match="does not know"):
        await lagging.ask(lagging.revisions.text(CALLER, 1))
    assert lagging.answered == []


async def test_texts_belong_to_a_tenant(lagging: Lagging) -> None:
    """A revision's text is of its tenant's id, so a later namesake cannot use it."""
    text = lagging.revisions.text(CALLER, 3)
    assert lagging.revisions.revision(CALLER, text) == 3
    for other in (BY, Principal("k", "acme", "read", 8)):
        with pytest.raises(InvalidRequest, match="no revision that this service gave"):
            lagging.revisions.revision(other, text)
