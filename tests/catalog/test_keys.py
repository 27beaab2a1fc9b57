"""`catalog.keys`: keys are made once, stored as a keyed hash, verified, expired and revoked."""

import stat
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
import sqlalchemy as sa

import prefix_service.catalog.keys as module
from prefix_service.catalog.audit import AuditLog
from prefix_service.catalog.database import Database
from prefix_service.catalog.keys import Keyring
from prefix_service.catalog.records import SCOPES, Principal, Scope
from prefix_service.catalog.schema import keys, metadata
from prefix_service.catalog.tenants import Tenants
from prefix_service.errors import Conflict, InvalidRequest, NotFound, StorageFailed, Unauthenticated
from tests.catalog.conftest import BY


@pytest.fixture(autouse=True)
def acme(tenants: Tenants) -> None:
    """Makes a tenant for every test."""
    assert tenants.put("acme", BY)


def soon(**distance: float) -> datetime:
    return datetime.now(UTC) + timedelta(**distance)


@pytest.mark.parametrize(
    ("tenant", "scope"), [*(("acme", scope) for scope in SCOPES[1:]), *((None, scope) for scope in SCOPES)]
)
def test_a_key_says_whose_it_is(keyring: Keyring, tenants: Tenants, tenant: str | None, scope: Scope) -> None:
    """A new key's text is returned once, and its record has its owner, scope and name."""
    key, text = keyring.create(tenant, scope, "ci", BY)
    owner = None if tenant is None else tenants.require(tenant)
    assert keyring.verify(text) == Principal(key.id, tenant, scope, owner)
    assert (key.tenant, key.scope, key.name, key.expires, key.last_used) == (tenant, scope, "ci", None, None)


def test_no_two_keys_are_alike(keyring: Keyring) -> None:
    """Keys have different ids and different random parts of 24 bytes."""
    texts = [keyring.create("acme", "read", "", BY)[1] for _ in range(20)]
    assert len({text[20:68] for text in texts}) == len(set(texts)) == 20


def test_only_a_keyed_hash_is_stored(keyring: Keyring, database: Database, secret: Path) -> None:
    """The random part of a key is in no table, and with another secret no key is valid."""
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
    """A key with any character changed is Unauthenticated."""
    _, text = keyring.create("acme", "read", "", BY)
    with pytest.raises(Unauthenticated, match="malformed"):
        keyring.verify(altered(text, at))


@pytest.mark.parametrize(
    "text", ["", "pfx_", "Bearer x", "pfx_" + "0" * 16 + "_" + "0" * 48 + "_00000000", "\u0661" * 77]
)
def test_what_does_not_look_like_a_key_is_refused(keyring: Keyring, text: str) -> None:
    """A text that is no key is refused without a query."""
    with pytest.raises(Unauthenticated, match="malformed"):
        keyring.verify(text)


def test_a_well_formed_key_that_was_never_made(keyring: Keyring, database: Database) -> None:
    """A key with the right checksum that was never made is Unauthenticated."""
    key, text = keyring.create("acme", "read", "", BY)
    with database.writing() as connection:
        connection.execute(sa.delete(keys).where(keys.c.id == key.id))
    with pytest.raises(Unauthenticated, match="unknown, expired or revoked"):
        keyring.verify(text)


def test_metrics_are_the_platforms(keyring: Keyring) -> None:
    """A tenant cannot have a key of scope metrics, since metrics are of all tenants."""
    with pytest.raises(InvalidRequest, match="scope metrics belongs to the platform"):
        keyring.create("acme", "metrics", "", BY)
    assert keyring.listed("acme") == []


@pytest.mark.parametrize("control", ["\0", "\n", "\x1b", "\x7f", "\x9b"])
def test_a_name_is_one_line_of_text(keyring: Keyring, control: str) -> None:
    """A control character in a key's name is refused, on either database; other characters are kept."""
    with pytest.raises(InvalidRequest, match=f"character 3 is U\\+00{ord(control):02X}: leave it out"):
        keyring.create("acme", "read", f"the{control}name", BY)
    assert keyring.listed("acme") == []
    assert keyring.create("acme", "read", "schlüssel 🔑", BY)[0].name == "schlüssel 🔑"


ZONES = [UTC, timezone(timedelta(hours=9)), timezone(timedelta(hours=-9)), None]


def in_zone(moment: datetime, zone: timezone | None) -> datetime:
    """Returns a moment as it is written in a time zone, or in UTC without one."""
    return moment.astimezone(zone) if zone else moment.astimezone(UTC).replace(tzinfo=None)


def set_end(database: Database, key_id: str, moment: datetime) -> None:
    """Moves a key's end, also into the past."""
    with database.writing() as connection:
        connection.execute(sa.update(keys).where(keys.c.id == key_id).values(expires=in_zone(moment, None)))


@pytest.mark.parametrize("zone", ZONES)
def test_a_key_lives_until_it_expires(keyring: Keyring, database: Database, zone: timezone | None) -> None:
    """A key's end is a moment in any time zone, UTC without one; the key is valid until then."""
    moment = soon(seconds=60)
    key, text = keyring.create("acme", "read", "", BY, in_zone(moment, zone))
    assert key.expires == moment.replace(tzinfo=None)
    keyring.verify(text)
    set_end(database, key.id, soon(seconds=-60))
    with pytest.raises(Unauthenticated, match="expired"):
        keyring.verify(text)


@pytest.mark.parametrize("zone", ZONES)
@pytest.mark.parametrize("ago", [1, 86_400])
def test_a_key_does_not_begin_with_its_end(keyring: Keyring, zone: timezone | None, ago: int) -> None:
    """An end in the past is refused for a new key and for an existing one."""
    with pytest.raises(InvalidRequest, match=r"is in the past, it is .*Z now"):
        keyring.create("acme", "read", "", BY, in_zone(soon(seconds=-ago), zone))
    assert keyring.listed("acme") == []
    key, text = keyring.create("acme", "read", "", BY)
    with pytest.raises(InvalidRequest, match="is in the past"):
        keyring.shorten("acme", key.id, in_zone(soon(seconds=-ago), zone), BY)
    assert keyring.get("acme", key.id) == key
    keyring.verify(text)


@pytest.mark.parametrize("moment", ["9999-12-31T23:59:59-14:00", "0001-01-01T00:00:00+14:00"])
def test_an_end_beyond_the_calendar(keyring: Keyring, moment: str) -> None:
    """An end that is no date in UTC is InvalidRequest."""
    key, _ = keyring.create("acme", "read", "", BY)
    for call in (
        lambda end: keyring.create("acme", "read", "", BY, end),
        lambda end: keyring.shorten("acme", key.id, end, BY),
    ):
        with pytest.raises(InvalidRequest, match="beyond the years that a date can have"):
            call(datetime.fromisoformat(moment))


@pytest.mark.parametrize("owner", ["acme", None])
def test_an_end_moves_to_an_earlier_moment_alone(keyring: Keyring, database: Database, owner: str | None) -> None:
    """A key without an end gets one; the same end changes nothing; a later one is refused."""
    key, text = keyring.create(owner, "read", "ci", BY)
    other, _ = keyring.create(owner, "read", "", BY)
    day, week = soon(days=1), soon(weeks=1)
    for end in (week, week, day):
        changed = keyring.shorten(owner, key.id, end, BY)
        assert changed == keyring.get(owner, key.id)
        assert (changed.expires, changed.name, changed.scope) == (in_zone(end, None), "ci", "read")
    with pytest.raises(Conflict, match=r"the key ends at .*, and .* would be later"):
        keyring.shorten(owner, key.id, week, BY)
    assert keyring.get(owner, key.id).expires == in_zone(day, None)
    assert keyring.get(owner, other.id).expires is None
    keyring.verify(text)
    noted = AuditLog(database).listed(None, before=None, limit=3)
    assert [(entry.action, entry.target, entry.tenant) for entry in noted] == [
        *(("key.changed", key.id, owner),) * 2,
        ("key.created", other.id, owner),
    ]
    assert [entry.details for entry in noted[:2]] == [
        {"expires": f"{in_zone(end, None).isoformat()}Z"} for end in (day, week)
    ]


def test_a_key_that_has_expired_stays_so(keyring: Keyring, database: Database) -> None:
    """The end of an expired key cannot be moved."""
    key, text = keyring.create("acme", "read", "", BY)
    set_end(database, key.id, soon(seconds=-60))
    with pytest.raises(Conflict):
        keyring.shorten("acme", key.id, soon(days=1), BY)
    with pytest.raises(Unauthenticated):
        keyring.verify(text)


@pytest.mark.parametrize("owner", ["acme", None])
def test_a_key_may_end_itself(keyring: Keyring, owner: str | None) -> None:
    """A key can give itself an end, although its transaction holds the key's row."""
    by = keyring.verify(keyring.create(owner, "admin", "", BY)[1])
    assert keyring.shorten(owner, by.key_id, soon(days=1), by).expires is not None


def test_a_revoked_key_is_nobodys(keyring: Keyring) -> None:
    """A revoked key is Unauthenticated immediately."""
    key, text = keyring.create("acme", "read", "", BY)
    keyring.revoke("acme", key.id, BY)
    with pytest.raises(Unauthenticated):
        keyring.verify(text)
    with pytest.raises(NotFound):
        keyring.revoke("acme", key.id, BY)


@pytest.mark.parametrize(("owner", "other"), [("acme", "beta"), ("acme", None), (None, "acme"), (None, "ghost")])
def test_a_key_is_its_owners_alone(keyring: Keyring, tenants: Tenants, owner: str | None, other: str | None) -> None:
    """A key cannot be ended or revoked by another or a missing tenant, and a platform's key not by a tenant."""
    tenants.put("beta", BY)
    key, text = keyring.create(owner, "read", "", BY)
    words = "there is no tenant 'ghost'" if other == "ghost" else "has no key"
    for call in (
        lambda: keyring.revoke(other, key.id, BY),
        lambda: keyring.shorten(other, key.id, soon(days=1), BY),
        lambda: keyring.get(other, key.id),
    ):
        with pytest.raises(NotFound, match=words):
            call()
    assert keyring.get(owner, key.id) == key
    keyring.verify(text)


def test_a_listing_has_the_owners_keys(keyring: Keyring, tenants: Tenants) -> None:
    """A listing has the owner's keys alone, the oldest first."""
    tenants.put("beta", BY)
    made = [keyring.create(tenant, "read", str(n), BY)[0] for n, tenant in enumerate(("acme", None, "beta", "acme"))]
    assert {key.name for key in keyring.listed("acme")} == {"0", "3"}
    assert keyring.listed(None) == [made[1]]
    assert keyring.listed("beta") == [made[2]]
    with pytest.raises(NotFound):
        keyring.listed("ghost")


def test_listings_come_in_pages(keyring: Keyring, tenants: Tenants) -> None:
    """Pages have each key once, also keys that were made in the same second."""
    tenants.put("acme", BY)
    made = [keyring.create("acme", "read", str(n), BY)[0] for n in range(7)]
    found, after = [], None
    while page := keyring.listed("acme", after=after, limit=2):
        found += page
        after = page[-1].created, page[-1].id
    assert found == keyring.listed("acme")
    assert {key.id for key in found} == {key.id for key in made}


@pytest.mark.parametrize("owner", ["acme", None])
def test_an_owner_has_so_many_keys_and_no_more(
    keyring: Keyring, monkeypatch: pytest.MonkeyPatch, owner: str | None
) -> None:
    """An owner can have a bounded number of keys, and revoking one makes room for another."""
    monkeypatch.setattr(module, "MOST_KEYS", 2)
    first, _ = keyring.create(owner, "read", "", BY)
    keyring.create(owner, "read", "", BY)
    with pytest.raises(Conflict, match="has 2 keys, and may have 2: revoke those that nobody uses"):
        keyring.create(owner, "read", "", BY)
    keyring.create("acme" if owner is None else None, "read", "", BY)  # others are not concerned
    keyring.revoke(owner, first.id, BY)
    keyring.create(owner, "read", "", BY)


def test_a_key_needs_its_tenant(keyring: Keyring) -> None:
    """A key for a missing tenant is refused, since a key without a tenant is the platform's."""
    with pytest.raises(NotFound, match="there is no tenant 'ghost'"):
        keyring.create("ghost", "read", "", BY)


def test_the_last_use_is_noted_once_a_minute(keyring: Keyring) -> None:
    """The last use of a key is noted once a minute, by whichever process; a revoked key is passed over."""
    key, _ = keyring.create("acme", "read", "", BY)
    other, _ = keyring.create("acme", "read", "", BY)

    def last_used() -> datetime | None:
        return next(found.last_used for found in keyring.listed("acme") if found.id == key.id)

    keyring.note_uses({key.id: 7200, other.id: 7200, "0" * 16: 7200})
    first = last_used()
    assert first is not None
    keyring.note_uses({key.id: 7200 - 30})
    assert last_used() == first
    keyring.note_uses({key.id: 7200 - 90})
    later = last_used()
    assert later is not None
    assert timedelta(seconds=80) < later - first < timedelta(seconds=150)


def test_the_keys_that_were_used_last_come_last(keyring: Keyring) -> None:
    """Keys come by their last use; one that was never used counts from when it was made."""
    ids = [keyring.create("acme", "read", "", BY)[0].id for _ in range(3)]
    keyring.note_uses({ids[1]: -3600, ids[2]: 3600})
    assert keyring.latest_ids(9) == [ids[2], ids[0], ids[1]]
    assert keyring.latest_ids(2) == [ids[0], ids[1]]


@pytest.mark.parametrize(
    ("scope", "holds"),
    [
        ("metrics", {"metrics"}),
        ("read", {"metrics", "read"}),
        ("write", {"metrics", "read", "write"}),
        ("admin", set(SCOPES)),
    ],
)
def test_a_scope_holds_the_smaller_ones(scope: Scope, holds: set[str]) -> None:
    """A scope includes the smaller ones, in the order metrics, read, write, admin."""
    assert {wanted for wanted in SCOPES if Principal("id", None, scope).has(wanted)} == holds


def test_a_tenants_key_sees_its_tenant_alone() -> None:
    """A tenant's key sees that tenant alone, and the platform's sees all."""
    assert [Principal("id", owner, "admin").may_see("acme") for owner in ("acme", "beta", None)] == [True, False, True]


def test_the_secret_is_made_once_and_is_private(database: Database, secret: Path) -> None:
    """The secret is 32 random bytes in a file of mode 0600, and stays the same."""
    Keyring(database, secret)
    made = secret.read_text()
    Keyring(database, secret)
    assert secret.read_text() == made
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    assert len(bytes.fromhex(made.strip())) == 32


def test_two_who_start_at_once_agree_on_the_secret(database: Database, secret: Path) -> None:
    """Two processes that start in parallel have one secret, and leave no half-written file."""
    with ThreadPoolExecutor(8) as pool:
        rings = [future.result() for future in [pool.submit(Keyring, database, secret) for _ in range(8)]]
    _, text = rings[0].create("acme", "read", "", BY)
    assert len({ring.verify(text) for ring in rings}) == 1
    assert list(secret.parent.iterdir()) == [secret]


@pytest.mark.parametrize("content", [b"", b"short", b" " * 40])
def test_a_secret_that_is_unusable_is_refused(database: Database, secret: Path, content: bytes) -> None:
    """A secret that is empty or too short is refused, and the message says what to do."""
    secret.parent.mkdir()
    secret.write_bytes(content)
    with pytest.raises(StorageFailed, match=r"key\.secret is shorter than 32 bytes: restore it"):
        Keyring(database, secret)


def test_a_secret_may_be_any_bytes(database: Database, secret: Path) -> None:
    """A secret that an operator brings may be any bytes, not only hex digits."""
    secret.parent.mkdir()
    secret.write_bytes(b"\xff\x00" * 16)
    _, text = Keyring(database, secret).create(None, "read", "", BY)
    assert Keyring(database, secret).verify(text).tenant is None


def test_a_secret_that_cannot_be_made(database: Database, tmp_path: Path) -> None:
    """A secret that cannot be written is an error of this project."""
    (tmp_path / "file").touch()
    with pytest.raises(StorageFailed, match=r"cannot make the keys' secret key\.secret"):
        Keyring(database, tmp_path / "file" / "key.secret")
