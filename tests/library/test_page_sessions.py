"""`library.page_sessions` looks each session up at every request, and unknown ones as rarely as unknown keys."""

from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa

from prefix_service.catalog.database import Database
from prefix_service.catalog.keys import Keyring
from prefix_service.catalog.records import COMMAND_LINE, Principal
from prefix_service.catalog.schema import sessions
from prefix_service.catalog.sessions import Session, Sessions
from prefix_service.catalog.tenants import Tenants
from prefix_service.errors import Overloaded, Unauthenticated
from prefix_service.library.page_sessions import PageSessions
from prefix_service.library.unknown_ids import UnknownIds
from prefix_service.system.turns import ASKING

SECRET = b"s" * 32


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    opened = Database(tmp_path / "catalog.sqlite")
    yield opened
    opened.close()


@pytest.fixture
def keyring(database: Database, tmp_path: Path) -> Keyring:
    return Keyring(database, tmp_path / "key.secret")


@pytest.fixture
def caller(keyring: Keyring) -> Principal:
    return keyring.verify(keyring.create(None, "read", "", COMMAND_LINE)[1])


class ThreeUnknownIds(UnknownIds):
    """Lets three unknown ids be looked up, then no more."""

    left = 3

    def admit(self) -> None:
        if not self.left:
            raise Overloaded("too many unknown keys")
        self.left -= 1


@pytest.fixture
def browsers(database: Database) -> PageSessions:
    return PageSessions(Sessions(database), ThreeUnknownIds(), SECRET)


async def test_a_session_that_is_known_is_always_looked_up(
    browsers: PageSessions, caller: Principal, database: Database
) -> None:
    """A known session is found while too many sessions of elsewhere are tried."""
    known = await browsers.begin(caller)
    elsewhere = PageSessions(Sessions(database), ThreeUnknownIds(), SECRET)
    others = [await elsewhere.begin(caller) for _ in range(4)]
    for other in others[:3]:
        await elsewhere.end(other)
        with pytest.raises(Unauthenticated):
            await browsers.find(other)
    assert replace(await browsers.find(known), session=None) == caller
    with pytest.raises(Overloaded):
        await browsers.find(others[3])


async def test_an_id_that_nobody_made_is_not_looked_up(
    browsers: PageSessions, caller: Principal, database: Database
) -> None:
    """Whoever tries ids, or signs out with them, without a key, takes neither lookups nor writes of the catalog, so
    that a session of another process, or of before a restart, is found all the same."""
    session = await PageSessions(Sessions(database), ThreeUnknownIds(), SECRET).begin(caller)
    forged = await PageSessions(Sessions(database), ThreeUnknownIds(), b"t" * 32).begin(caller)
    for made_up in (*(f"{number:055}" for number in range(10)), session[:-1] + "!", forged):
        with pytest.raises(Unauthenticated):
            await browsers.find(made_up)
        await browsers.end(made_up)
    assert replace(await browsers.find(session), session=None) == caller


async def test_a_session_that_has_ended_is_unknown(browsers: PageSessions, caller: Principal) -> None:
    """A client that keeps the id of an ended session tries no more often than with any other."""
    ended = await browsers.begin(caller)
    await browsers.end(ended)
    for _ in range(3):
        with pytest.raises(Unauthenticated):
            await browsers.find(ended)
    with pytest.raises(Overloaded):
        await browsers.find(ended)


class WatchedSessions(Sessions):
    """Remembers in whose turn each session was looked up."""

    def __init__(self, database: Database) -> None:
        super().__init__(database)
        self.turns: list[str] = []

    def find(self, session_id: str) -> Session | None:
        self.turns.append(ASKING.get())
        return super().find(session_id)


async def test_a_session_is_looked_up_in_the_turn_of_its_tenant(
    database: Database, keyring: Keyring, caller: Principal
) -> None:
    """A tenant that calls without pause, also above its rate, takes no turns of the platform's admins."""
    Tenants(database).put("acme", COMMAND_LINE)
    of_tenant = keyring.verify(keyring.create("acme", "read", "", COMMAND_LINE)[1])
    sessions = WatchedSessions(database)
    browsers = PageSessions(sessions, ThreeUnknownIds(), SECRET)
    elsewhere = await PageSessions(sessions, ThreeUnknownIds(), SECRET).begin(of_tenant)
    for session_id in (await browsers.begin(of_tenant), await browsers.begin(caller), elsewhere, elsewhere):
        await browsers.find(session_id)
    assert sessions.turns == ["acme", "", "", "acme"]


async def test_a_stream_does_not_keep_a_session_alive(
    browsers: PageSessions, caller: Principal, database: Database
) -> None:
    """Only requests are use: an open page in which nobody does anything ends after an hour."""
    session = await browsers.begin(caller)

    def unused() -> timedelta:
        with database.reading() as connection:
            row = connection.execute(sa.select(sessions.c.began, sessions.c.used)).one()
        passed: timedelta = row.began - row.used
        return passed

    with database.writing() as connection:
        moment = connection.scalar(sa.select(sessions.c.began))
        assert moment is not None
        connection.execute(sa.update(sessions).values(used=moment - timedelta(minutes=10)))
    assert replace(await browsers.find(session, notes_use=False), session=None) == caller
    assert unused() == timedelta(minutes=10)
    assert replace(await browsers.find(session), session=None) == caller
    assert unused() <= timedelta(0)
