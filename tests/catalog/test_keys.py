"""`catalog.keys`: made once, stored as a keyed hash, verified, expired, revoked."""

import stat
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
import sqlalchemy as sa

from prefix_service.catalog.database import Database
from prefix_service.catalog.keys import Keyring
from prefix_service.catalog.records import SCOPES, Principal, Scope
from prefix_service.catalog.schema import keys, metadata
from prefix_service.catalog.tenants import Tenants
from prefix_service.errors import NotFound, StorageFailed, Unauthenticated
from tests.catalog.conftest import BY


@pytest.fixture(autouse=True)
def acme(tenants: Tenants) -> None:
    """A tenant for every test."""
    assert tenants.put("acme", BY)


def soon(**distance: float) -> datetime:
    return datetime.now(UTC) + timedelta(**distance)


@pytest.mark.parametrize("tenant", ["acme", None])
@pytest.mark.parametrize("scope", SCOPES)
def test_a_key_says_whose_it_is(keyring: Keyring, tenants: Tenants, tenant: str | None, scope: Scope) -> None:
    """Its text alone; its record has everything else."""
    key, text = keyring.create(tenant, scope, "ci", BY)
    owner = None if tenant is None else tenants.require(tenant)
    assert keyring.verify(text) == Principal(key.id, tenant, scope, owner)
    assert (key.tenant, key.scope, key.name, key.expires, key.last_used) == (tenant, scope, "ci", None, None)


def test_no_two_keys_are_alike(keyring: Keyring) -> None:
    """Nor can one be guessed from another: 24 random bytes each."""
    texts = [keyring.create("acme", "read", "", BY)[1] for _ in range(20)]
    assert len({text[20:68] for text in texts}) == len(set(texts)) == 20


def test_only_a_keyed_hash_is_stored(keyring: Keyring, database: Database, secret: Path) -> None:
    """The random part of the text is in no table; another secret verifies nothing."""
    key, text = keyring.create("acme", "read", "", BY)
    with database.reading() as connection:
        rows = [tuple(row) for table in metadata.sorted_tables for row in connection.execute(sa.select(table))]
    assert key.id in str(rows)
    assert text.split("_")[2] not in str(rows)
    secret.write_text("another secret of more than thirty-two characters")
    with pytest.raises(Unauthenticated):
        Keyring(database, secret).verify(text)


def altered(text: str, at: int) -> str:
    return text[:at] + ("0" if text[at] != "0" else "1") + text[at + 1 :]


@pytest.mark.parametrize("at", [0, 4, 19, 20, 67, 69, 76])
def test_an_altered_key_is_nobodys(keyring: Keyring, at: int) -> None:
    """Wherever a character was changed."""
    _, text = keyring.create("acme", "read", "", BY)
    with pytest.raises(Unauthenticated, match="malformed"):
        keyring.verify(altered(text, at))


@pytest.mark.parametrize(
    "text", ["", "pfx_", "Bearer x", "pfx_" + "0" * 16 + "_" + "0" * 48 + "_00000000", "\u0661" * 77]
)
def test_what_does_not_look_like_a_key_is_refused(keyring: Keyring, text: str) -> None:
    """Before the database is asked."""
    with pytest.raises(Unauthenticated, match="malformed"):
        keyring.verify(text)


def test_a_well_formed_key_that_was_never_made(keyring: Keyring, database: Database) -> None:
    """Its checksum is right, and it is unknown."""
    key, text = keyring.create("acme", "read", "", BY)
    with database.writing() as connection:
        connection.execute(sa.delete(keys).where(keys.c.id == key.id))
    with pytest.raises(Unauthenticated, match="unknown, expired or revoked"):
        keyring.verify(text)


@pytest.mark.parametrize("zone", [UTC, timezone(timedelta(hours=9)), timezone(timedelta(hours=-9)), None])
@pytest.mark.parametrize(("distance", "alive"), [(60, True), (-60, False)])
def test_a_key_lives_until_it_expires(keyring: Keyring, zone: timezone | None, distance: int, alive: bool) -> None:
    """In whatever time zone that was said; without one it is UTC."""
    moment = soon(seconds=distance)
    expires = moment.astimezone(zone) if zone else moment.replace(tzinfo=None)
    key, text = keyring.create("acme", "read", "", BY, expires)
    assert key.expires == moment.replace(tzinfo=None)
    if alive:
        keyring.verify(text)
    else:
        with pytest.raises(Unauthenticated, match="expired"):
            keyring.verify(text)


def test_a_revoked_key_is_nobodys(keyring: Keyring) -> None:
    """At once."""
    key, text = keyring.create("acme", "read", "", BY)
    keyring.revoke("acme", key.id, BY)
    with pytest.raises(Unauthenticated):
        keyring.verify(text)
    with pytest.raises(NotFound):
        keyring.revoke("acme", key.id, BY)


@pytest.mark.parametrize(("owner", "other"), [("acme", "beta"), ("acme", None), (None, "acme"), (None, "ghost")])
def test_a_key_is_revoked_by_its_owner_alone(
    keyring: Keyring, tenants: Tenants, owner: str | None, other: str | None
) -> None:
    """Not by another tenant, not by one that does not exist, and a platform's not by a tenant."""
    tenants.put("beta", BY)
    key, text = keyring.create(owner, "read", "", BY)
    with pytest.raises(NotFound):
        keyring.revoke(other, key.id, BY)
    keyring.verify(text)


def test_a_listing_has_the_owners_keys(keyring: Keyring, tenants: Tenants) -> None:
    """Oldest first, and nobody else's."""
    tenants.put("beta", BY)
    made = [keyring.create(tenant, "read", str(n), BY)[0] for n, tenant in enumerate(("acme", None, "beta", "acme"))]
    assert {key.name for key in keyring.listed("acme")} == {"0", "3"}
    assert keyring.listed(None) == [made[1]]
    assert keyring.listed("beta") == [made[2]]
    with pytest.raises(NotFound):
        keyring.listed("ghost")


def test_listings_come_in_pages(keyring: Keyring, tenants: Tenants) -> None:
    """Of keys that were made in the same second too."""
    tenants.put("acme", BY)
    made = [keyring.create("acme", "read", str(n), BY)[0] for n in range(7)]
    found, after = [], None
    while page := keyring.listed("acme", after=after, limit=2):
        found += page
        after = page[-1].created, page[-1].id
    assert found == keyring.listed("acme")
    assert {key.id for key in found} == {key.id for key in made}


def test_a_key_needs_its_tenant(keyring: Keyring) -> None:
    """A key of nobody would be the platform's."""
    with pytest.raises(NotFound, match="there is no tenant 'ghost'"):
        keyring.create("ghost", "read", "", BY)


def test_the_last_use_is_noted_once_a_minute(keyring: Keyring) -> None:
    """Whichever process notes it; a key that has been revoked is not missed."""
    key, _ = keyring.create("acme", "read", "", BY)
    other, _ = keyring.create("acme", "read", "", BY)
    moment = datetime(2026, 1, 1)  # noqa: DTZ001 - as the catalog has it

    def last_used() -> datetime | None:
        return next(found.last_used for found in keyring.listed("acme") if found.id == key.id)

    keyring.note_uses({key.id: moment, other.id: moment, "0" * 16: moment})
    assert last_used() == moment
    for seconds, changes in ((30, False), (60, True)):
        later = moment + timedelta(seconds=seconds)
        keyring.note_uses({key.id: later})
        assert (last_used() == later) == changes


def test_the_keys_that_were_used_last_come_last(keyring: Keyring) -> None:
    """A key that was never used counts from when it was made."""
    ids = [keyring.create("acme", "read", "", BY)[0].id for _ in range(3)]
    now = datetime.now(UTC).replace(tzinfo=None)
    keyring.note_uses({ids[1]: now + timedelta(hours=1), ids[2]: now - timedelta(hours=1)})
    assert keyring.latest_ids(9) == [ids[2], ids[0], ids[1]]
    assert keyring.latest_ids(2) == [ids[0], ids[1]]


@pytest.mark.parametrize(("scope", "holds"), [("read", {"read"}), ("write", {"read", "write"}), ("admin", set(SCOPES))])
def test_a_scope_holds_the_smaller_ones(scope: Scope, holds: set[str]) -> None:
    """read, write, admin."""
    assert {wanted for wanted in SCOPES if Principal("id", None, scope).has(wanted)} == holds


def test_a_tenants_key_sees_its_tenant_alone() -> None:
    """The platform's sees all."""
    assert [Principal("id", owner, "admin").may_see("acme") for owner in ("acme", "beta", None)] == [True, False, True]


def test_the_secret_is_made_once_and_is_private(database: Database, secret: Path) -> None:
    """Mode 0600, 32 random bytes, and it stays."""
    Keyring(database, secret)
    made = secret.read_text()
    Keyring(database, secret)
    assert secret.read_text() == made
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    assert len(bytes.fromhex(made.strip())) == 32


def test_two_who_start_at_once_agree_on_the_secret(database: Database, secret: Path) -> None:
    """Each verifies the other's keys, and no half-written file is left."""
    with ThreadPoolExecutor(8) as pool:
        rings = [future.result() for future in [pool.submit(Keyring, database, secret) for _ in range(8)]]
    _, text = rings[0].create("acme", "read", "", BY)
    assert len({ring.verify(text) for ring in rings}) == 1
    assert list(secret.parent.iterdir()) == [secret]


@pytest.mark.parametrize("content", [b"", b"short", b" " * 40])
def test_a_secret_that_is_unusable_is_refused(database: Database, secret: Path, content: bytes) -> None:
    """With what to do: an empty secret would make every hash a public one."""
    secret.parent.mkdir()
    secret.write_bytes(content)
    with pytest.raises(StorageFailed, match=r"key\.secret is shorter than 32 bytes: restore it"):
        Keyring(database, secret)


def test_a_secret_may_be_any_bytes(database: Database, secret: Path) -> None:
    """Whoever brings one need not write it in hex."""
    secret.parent.mkdir()
    secret.write_bytes(b"\xff\x00" * 16)
    _, text = Keyring(database, secret).create(None, "read", "", BY)
    assert Keyring(database, secret).verify(text).tenant is None


def test_a_secret_that_cannot_be_made(database: Database, tmp_path: Path) -> None:
    """In words, without a traceback."""
    (tmp_path / "file").touch()
    with pytest.raises(StorageFailed, match=r"cannot make the keys' secret key\.secret"):
        Keyring(database, tmp_path / "file" / "key.secret")
