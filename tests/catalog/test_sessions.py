"""`catalog.sessions`: a session ends after 12 hours, after an hour without use, and with its key."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa

from prefix_service.catalog.database import Database, now
from prefix_service.catalog.keys import Keyring
from prefix_service.catalog.records import Principal
from prefix_service.catalog.retention import expire_sessions
from prefix_service.catalog.schema import keys, sessions
from prefix_service.catalog.sessions import Sessions
from prefix_service.catalog.tenants import Tenants
from prefix_service.errors import Unauthenticated
from tests.catalog.conftest import BY


@pytest.fixture
def keyring(database: Database, tmp_path: Path) -> Keyring:
    Tenants(database).put("acme", BY)
    return Keyring(database, tmp_path / "key.secret")


@pytest.fixture
def caller(keyring: Keyring) -> Principal:
    return keyring.verify(keyring.create("acme", "write", "", BY)[1])


def move(database: Database, **columns: timedelta) -> None:
    """Moves moments of all sessions back."""
    with database.writing() as connection:
        for row in connection.execute(sa.select(sessions)).mappings().all():
            earlier = {name: row[name] - past for name, past in columns.items()}
            connection.execute(sa.update(sessions).where(sessions.c.hash == row["hash"]).values(earlier))


def test_a_session_stands_for_its_key(database: Database, caller: Principal) -> None:
    """A session is found by its id alone, and the catalog does not contain the id."""
    made = Sessions(database)
    session_id = made.begin(caller)
    found = made.find(session_id)
    assert found is not None
    assert (replace(found.principal, session=None), found.is_use_due) == (caller, False)
    assert made.find(session_id[:-1]) is None
    with database.reading() as connection:
        assert session_id not in str(connection.execute(sa.select(sessions)).all())


@pytest.mark.parametrize(
    ("began", "used", "is_alive"),
    [
        (timedelta(hours=11, minutes=59), timedelta(minutes=59), True),
        (timedelta(hours=12), timedelta(0), False),
        (timedelta(hours=2), timedelta(hours=1), False),
    ],
)
def test_a_session_ends(
    database: Database, caller: Principal, began: timedelta, used: timedelta, is_alive: bool
) -> None:
    """A session ends 12 hours after it began, and an hour after its last use."""
    made = Sessions(database)
    session_id = made.begin(caller)
    move(database, began=began, used=used)
    assert (made.find(session_id) is not None) == is_alive


def test_use_keeps_a_session_alive(database: Database, caller: Principal) -> None:
    """A use is noted once in a minute."""
    made = Sessions(database)
    session_id = made.begin(caller)
    move(database, used=timedelta(minutes=59))
    found = made.find(session_id)
    assert found is not None
    assert found.is_use_due
    made.note_use(session_id)
    found = made.find(session_id)
    assert found is not None
    assert not found.is_use_due


def test_a_session_ends_with_its_key(database: Database, keyring: Keyring, caller: Principal) -> None:
    """A session ends if its key is revoked, expires, or loses its tenant."""
    made = Sessions(database)
    revoked = made.begin(caller)
    other = keyring.verify(keyring.create("acme", "admin", "", BY)[1])
    of_tenant = made.begin(other)
    key, text = keyring.create("acme", "read", "", BY, datetime.now(UTC) + timedelta(hours=1))
    ending = made.begin(keyring.verify(text))
    keyring.revoke("acme", caller.key_id, BY)
    assert made.find(revoked) is None
    assert made.find(of_tenant) is not None
    assert made.find(ending) is not None
    with database.writing() as connection:
        ended = now(connection) - timedelta(seconds=1)
        connection.execute(sa.update(keys).where(keys.c.id == key.id).values(expires=ended))
    assert made.find(ending) is None
    Tenants(database).delete("acme", BY)
    assert made.find(of_tenant) is None
    with pytest.raises(Unauthenticated):
        made.begin(caller)


def test_a_session_that_is_ended(database: Database, caller: Principal) -> None:
    """A session that was ended is not found, others are, and ending it again changes nothing."""
    made = Sessions(database)
    first, second = made.begin(caller), made.begin(caller)
    made.end(first)
    made.end(first)
    assert made.find(first) is None
    assert made.find(second) is not None


def test_a_key_has_a_bounded_number_of_sessions(database: Database, caller: Principal) -> None:
    """Beyond the bound the oldest session of a key ends."""
    made = Sessions(database)
    ids = [made.begin(caller) for _ in range(33)]
    assert made.find(ids[0]) is None
    assert all(made.find(session_id) is not None for session_id in ids[1:])


def test_ended_sessions_are_removed(database: Database, caller: Principal) -> None:
    """Sessions that were not used for too long are removed, and no others."""
    made = Sessions(database)
    made.begin(caller)
    move(database, used=timedelta(hours=2))
    alive = made.begin(caller)
    assert not expire_sessions(database)
    with database.reading() as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(sessions)) == 1
    assert made.find(alive) is not None
