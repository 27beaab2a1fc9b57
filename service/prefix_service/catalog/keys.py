"""Bearer keys: made, verified, listed, given an end, revoked; only a keyed hash is stored."""

import hashlib
import hmac
import math
import os
import re
import secrets
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import sqlalchemy as sa

from prefix_service.catalog.audit import record
from prefix_service.catalog.authority import writing_for
from prefix_service.catalog.changes import KeyCreated, KeyRevoked, KeyShortened, announce
from prefix_service.catalog.database import Database, now
from prefix_service.catalog.records import COMMAND_LINE, Key, Principal, Scope
from prefix_service.catalog.schema import keys, tenants
from prefix_service.catalog.tenants import lock
from prefix_service.errors import Conflict, InvalidRequest, NotFound, StorageFailed, Unauthenticated
from prefix_service.system.disk import sync_folder, translated, write_private

# Recognisable to secret scanners: a fixed beginning, and a checksum that tells a key from a look-alike.
_KEY: Final = re.compile(r"(pfx_([0-9a-f]{16})_[0-9a-f]{48})_([0-9a-f]{8})")
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]")
MOST_KEYS: Final = 4096
"""Keys of a tenant, and of the platform: each process knows some 65,000, and one tenant must not fill that."""

USE_GRANULARITY: Final = timedelta(seconds=60)
"""Time between two notes of a key's last use."""

_KEY_ROW: Final = sa.select(
    keys.c.id,
    tenants.c.name.label("tenant"),
    keys.c.scope,
    keys.c.name,
    keys.c.created,
    keys.c.expires,
    keys.c.last_used,
).select_from(keys.outerjoin(tenants, keys.c.tenant_id == tenants.c.id))


@dataclass(frozen=True, slots=True)
class StoredKey:
    """A key in the catalog: whose it is, the hash of its text, and the moment of `time.monotonic` when it ends."""

    principal: Principal
    hash: str
    ends: float

    def admits(self, found: str) -> bool:
        """Whether the key is alive, and `found` is the hash of its text."""
        return hmac.compare_digest(self.hash, found) and time.monotonic() < self.ends


class Keyring:
    """The keys of one catalog, hashed with HMAC-SHA-256 under the secret of `secret_file`. Blocking.

    Any method may also raise OutOfSpace or StorageFailed, when the disk or the database refuses.
    """

    def __init__(self, database: Database, secret_file: Path) -> None:
        self._database = database
        self._secret = _load_secret(secret_file)

    def create(
        self, tenant: str | None, scope: Scope, name: str, by: Principal, expires: datetime | None = None
    ) -> tuple[Key, str]:
        """Returns a new key, and its text, which is not stored: its owner keeps it. A naive `expires` is in UTC.

        Raises:
            InvalidRequest: `expires` is not in the future, `name` has a control character, or a tenant's key would have
                the scope `metrics`.
            Unauthenticated: `by` has no authority any more.
            NotFound: there is no such tenant.
            Conflict: it has as many keys as it may have.
        """
        if scope == "metrics" and tenant is not None:
            raise InvalidRequest("a key of scope metrics belongs to the platform: the metrics are of all tenants")
        if control := _CONTROL.search(name):
            raise InvalidRequest(
                f"a key's name is one line of text, and its character {control.start()} is "
                f"U+{ord(control[0]):04X}: leave it out"
            )
        ends = None if expires is None else _in_utc(expires)
        with writing_for(self._database, by) as connection:
            owner = _changed(connection, tenant)
            if ends is not None:
                _require_future(connection, ends)
            _require_fewer_keys(connection, owner, tenant)
            return self._created(connection, (owner, tenant), scope, name, by, ends)

    def create_first(self, connection: sa.Connection) -> str:
        """Makes the first key of a catalog, a platform admin's, in a write transaction of the command line; returns its
        text."""
        return self._created(connection, (None, None), "admin", "bootstrap", COMMAND_LINE, None)[1]

    def _created(
        self,
        connection: sa.Connection,
        owner: tuple[int | None, str | None],
        scope: Scope,
        name: str,
        by: Principal,
        ends: datetime | None,
    ) -> tuple[Key, str]:
        """Makes a key of an owner, by the id and the name of its tenant."""
        owner_id, tenant = owner
        key_id = secrets.token_hex(8)
        body = f"pfx_{key_id}_{secrets.token_hex(24)}"
        text = f"{body}_{_checksum(body)}"
        row = {"id": key_id, "tenant_id": owner_id, "scope": scope, "name": name, "expires": ends}
        connection.execute(sa.insert(keys).values(hash=self._hash(text), **row))
        record(connection, by, "key.created", tenant, key_id, scope=scope, name=name)
        announce(connection, KeyCreated(tenant, key_id))
        return self._key(connection, key_id), text

    def parse(self, text: str) -> tuple[str, str]:
        """Returns the id in a key's text, and the hash of the text. The database is not asked.

        Raises:
            Unauthenticated: the text is malformed.
        """
        match = _KEY.fullmatch(text)
        if match is None or _checksum(match[1]) != match[3]:
            raise Unauthenticated("the key is malformed: it should look like pfx_…, copied whole")
        return match[2], self._hash(text)

    def find(self, key_id: str) -> StoredKey | None:
        """Returns a key by its id, alive or expired; None if it never existed or was revoked."""
        with self._database.reading() as connection:
            query = _KEY_ROW.add_columns(keys.c.hash, keys.c.tenant_id).where(keys.c.id == key_id)
            row, began, moment = connection.execute(query).one_or_none(), time.monotonic(), now(connection)
        if row is None:
            return None
        ends = math.inf if row.expires is None else began + (row.expires - moment).total_seconds()
        return StoredKey(Principal(row.id, row.tenant, row.scope, row.tenant_id), row.hash, ends)

    def verify(self, text: str) -> Principal:
        """Whose key this is.

        Raises:
            Unauthenticated: nobody's: malformed, unknown, expired or revoked.
        """
        key_id, found = self.parse(text)
        stored = self.find(key_id)
        if stored is None or not stored.admits(found):
            raise Unauthenticated("the key is unknown, expired or revoked")
        return stored.principal

    def latest_ids(self, limit: int) -> list[str]:
        """Returns the ids of the `limit` keys that were used or made last, the latest at the end."""
        latest = sa.func.coalesce(keys.c.last_used, keys.c.created)
        with self._database.reading() as connection:
            found = connection.scalars(sa.select(keys.c.id).order_by(latest.desc()).limit(limit)).all()
        return list(reversed(found))

    def note_uses(self, uses: Mapping[str, float]) -> None:
        """Note how many seconds ago keys, by their ids, were used. Of uses within `USE_GRANULARITY` the first is
        written."""
        late = sa.or_(keys.c.last_used.is_(None), keys.c.last_used <= sa.bindparam("early", type_=sa.DateTime))
        noted = sa.update(keys).where(keys.c.id == sa.bindparam("used"), late)
        noted = noted.values(last_used=sa.bindparam("moment", type_=sa.DateTime))
        with self._database.writing() as connection:
            present = now(connection)
            moments = {key: present - timedelta(seconds=ago) for key, ago in sorted(uses.items())}
            connection.execute(
                noted, [{"used": key, "moment": at, "early": at - USE_GRANULARITY} for key, at in moments.items()]
            )

    @property
    def fingerprint(self) -> str:
        """Names the keys' secret, and does not reveal it."""
        return self.derived("fingerprint").hex()[:32]

    def derived(self, purpose: str) -> bytes:
        """Returns a secret of 32 bytes for another purpose, made of the keys' secret with HMAC-SHA-256."""
        return hmac.digest(self._secret, f"purpose:{purpose}".encode(), "sha256")

    def listed(
        self, tenant: str | None, *, after: tuple[datetime, str] | None = None, limit: int | None = None
    ) -> list[Key]:
        """Up to `limit` keys of a tenant, or of the platform, oldest first, beginning behind the moment and the id of
        another; without a limit all.

        Raises:
            NotFound: there is no such tenant.
        """
        with self._database.reading() as connection:
            query = _KEY_ROW.where(keys.c.tenant_id == _tenant_id(connection, tenant))
            query = query.order_by(keys.c.created, keys.c.id).limit(limit)
            if after is not None:
                place = sa.tuple_(sa.literal(after[0], keys.c.created.type), sa.literal(after[1]))
                query = query.where(sa.tuple_(keys.c.created, keys.c.id) > place)
            return [Key(*row) for row in connection.execute(query)]

    def get(self, tenant: str | None, key_id: str) -> Key:
        """Returns one key.

        Raises:
            NotFound: this owner has no such key, or there is no such owner.
        """
        with self._database.reading() as connection:
            owned = keys.c.tenant_id == _tenant_id(connection, tenant)
            row = connection.execute(_KEY_ROW.where(keys.c.id == key_id, owned)).one_or_none()
        if row is None:
            raise _missing(tenant, key_id)
        return Key(*row)

    def shorten(self, tenant: str | None, key_id: str, expires: datetime, by: Principal) -> Key:
        """Give a key an end, or an earlier one than it has, and return it. A naive `expires` is in UTC. The end that
        the key has already changes nothing, so that a caller may try again.

        Raises:
            InvalidRequest: `expires` is not in the future.
            Conflict: the key ends earlier than that.
            Unauthenticated: `by` has no authority any more.
            NotFound: this owner has no such key, or there is no such owner.
        """
        ends = _in_utc(expires)
        with writing_for(self._database, by) as connection:
            owner = _changed(connection, tenant)
            # FOR NO KEY UPDATE: a key may give itself an end, and `writing_for` holds its row FOR KEY SHARE.
            query = sa.select(keys.c.expires).where(keys.c.id == key_id, keys.c.tenant_id == owner)
            row = connection.execute(query.with_for_update(key_share=True)).one_or_none()
            if row is None:
                raise _missing(tenant, key_id)
            _require_future(connection, ends)
            if row.expires is not None and row.expires < ends:
                raise Conflict(
                    f"the key ends at {_shown(row.expires)}, and {_shown(ends)} would be later: an end can only move "
                    "to an earlier moment; make another key to go on"
                )
            if row.expires != ends:
                connection.execute(sa.update(keys).where(keys.c.id == key_id).values(expires=ends))
                record(connection, by, "key.changed", tenant, key_id, expires=_shown(ends))
                announce(connection, KeyShortened(tenant, key_id))
            return self._key(connection, key_id)

    def revoke(self, tenant: str | None, key_id: str, by: Principal) -> None:
        """Forget a key.

        Raises:
            Unauthenticated: `by` has no authority any more.
            NotFound: this owner has no such key, or there is no such owner.
        """
        with writing_for(self._database, by, frees=True) as connection:
            owner = _changed(connection, tenant)
            record(connection, by, "key.revoked", tenant, key_id)  # first: a key that revokes itself has a name yet
            gone = sa.delete(keys).where(keys.c.id == key_id, keys.c.tenant_id == owner)
            if connection.execute(gone).rowcount == 0:
                raise _missing(tenant, key_id)
            announce(connection, KeyRevoked(tenant, key_id))

    def _key(self, connection: sa.Connection, key_id: str) -> Key:
        return Key(*connection.execute(_KEY_ROW.where(keys.c.id == key_id)).one())

    def _hash(self, text: str) -> str:
        return hmac.new(self._secret, text.encode(), hashlib.sha256).hexdigest()


def _tenant_id(connection: sa.Connection, tenant: str | None) -> int | None:
    """A tenant's id; None, which SQLAlchemy compares with IS NULL, for the platform."""
    if tenant is None:
        return None
    found: int | None = connection.scalar(sa.select(tenants.c.id).where(tenants.c.name == tenant))
    if found is None:
        raise NotFound(f"there is no tenant {tenant!r}")
    return found


def _changed(connection: sa.Connection, tenant: str | None) -> int | None:
    """The id of the tenant whose keys are about to change; None for the platform."""
    return None if tenant is None else lock(connection, tenant).id


def _missing(tenant: str | None, key_id: str) -> NotFound:
    if tenant is None:
        return NotFound(f"the platform has no key {key_id!r:.40}; to reach a tenant's key, name the tenant")
    return NotFound(f"tenant {tenant!r} has no key {key_id!r:.40}")


def _in_utc(moment: datetime) -> datetime:
    """Returns a moment, naive and in UTC, as the catalog has it.

    Raises:
        InvalidRequest: in UTC its year would be before 1 or after 9999.
    """
    try:
        return moment.replace(tzinfo=None) if moment.tzinfo is None else moment.astimezone(UTC).replace(tzinfo=None)
    except OverflowError as error:
        raise InvalidRequest(f"expires: {moment.isoformat()} is beyond the years that a date can have") from error


def _require_future(connection: sa.Connection, ends: datetime) -> None:
    """Raises InvalidRequest if a key that ends at this moment, naive and in UTC, would have ended already."""
    if ends <= (moment := now(connection)):
        raise InvalidRequest(
            f"expires: {_shown(ends)} is in the past, it is {_shown(moment)} now: name a later moment; a key that is "
            "to end immediately is revoked"
        )


def _require_fewer_keys(connection: sa.Connection, owner: int | None, tenant: str | None) -> None:
    found = connection.scalar(sa.select(sa.func.count()).where(keys.c.tenant_id.is_not_distinct_from(owner))) or 0
    if found >= MOST_KEYS:
        whose = "the platform" if tenant is None else f"tenant {tenant!r}"
        raise Conflict(f"{whose} has {found} keys, and may have {MOST_KEYS}: revoke those that nobody uses")


def _shown(moment: datetime) -> str:
    return f"{moment.isoformat()}Z"


def _checksum(body: str) -> str:
    return f"{zlib.crc32(body.encode()):08x}"


def _load_secret(path: Path) -> bytes:
    """The secret, made on first use: written aside and linked, so that two processes agree on one."""
    with translated(f"make the keys' secret {path.name}"):
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            aside = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
            write_private(aside, secrets.token_hex(32))
            try:
                os.link(aside, path)
            except FileExistsError:
                pass
            finally:
                aside.unlink()
            sync_folder(path.parent)
        secret = path.read_bytes().strip()
    if len(secret) < 32:
        raise StorageFailed(f"the keys' secret {path} is shorter than 32 bytes: restore it, or keys stay unusable")
    return secret
