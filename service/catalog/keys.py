"""Bearer keys: made, verified, listed, revoked; only a keyed hash is stored."""

import contextlib
import hashlib
import hmac
import os
import re
import secrets
import zlib
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import sqlalchemy as sa

from service.catalog.audit import record
from service.catalog.database import Database, now
from service.catalog.records import Key, Principal, Scope
from service.catalog.schema import keys, tenants
from service.catalog.tenants import lock
from service.disk import sync_folder, translated, write_private
from service.errors import NotFound, OutOfSpace, StorageFailed, Unauthenticated

# Recognisable to secret scanners: a fixed beginning, and a checksum that tells a key from a look-alike.
_KEY: Final = re.compile(r"(pfx_([0-9a-f]{16})_[0-9a-f]{48})_([0-9a-f]{8})")
_USE_GRANULARITY: Final = timedelta(seconds=60)  # between two notes of a key's last use

_KEY_ROW: Final = sa.select(
    keys.c.id,
    tenants.c.name.label("tenant"),
    keys.c.scope,
    keys.c.name,
    keys.c.created,
    keys.c.expires,
    keys.c.last_used,
).select_from(keys.outerjoin(tenants, keys.c.tenant_id == tenants.c.id))


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
        """A new key, and the text that its owner keeps; it is not told again. A naive `expires` is in UTC.

        Raises:
            NotFound: there is no such tenant.
        """
        if expires is not None and expires.tzinfo is not None:
            expires = expires.astimezone(UTC).replace(tzinfo=None)
        key_id = secrets.token_hex(8)
        body = f"pfx_{key_id}_{secrets.token_hex(24)}"
        text = f"{body}_{_checksum(body)}"
        with self._database.writing() as connection:
            owner = _changed(connection, tenant)
            row = {"id": key_id, "tenant_id": owner, "scope": scope, "name": name, "expires": expires}
            connection.execute(sa.insert(keys).values(hash=self._hash(text), **row))
            record(connection, by, "key.created", tenant, key_id, scope=scope, name=name)
            return self._key(connection, key_id), text

    def verify(self, text: str) -> Principal:
        """Whose key this is.

        Raises:
            Unauthenticated: nobody's: malformed, unknown, expired or revoked.
        """
        match = _KEY.fullmatch(text)
        if match is None or _checksum(match[1]) != match[3]:
            raise Unauthenticated("the key is malformed: it should look like pfx_…, copied whole")
        alive = sa.or_(keys.c.expires.is_(None), keys.c.expires > sa.func.now())
        with self._database.reading() as connection:
            query = _KEY_ROW.add_columns(keys.c.hash).where(keys.c.id == match[2], alive)
            row = connection.execute(query).one_or_none()
            moment = now(connection)
        if not hmac.compare_digest(self._hash(text), "" if row is None else row.hash) or row is None:
            raise Unauthenticated("the key is unknown, expired or revoked")
        if row.last_used is None or moment - row.last_used >= _USE_GRANULARITY:
            # A full disk must not make a sound key useless.
            with contextlib.suppress(OutOfSpace, StorageFailed), self._database.writing() as connection:
                connection.execute(sa.update(keys).where(keys.c.id == row.id).values(last_used=moment))
        return Principal(row.id, row.tenant, row.scope)

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
        """One key.

        Raises:
            NotFound: this owner has no such key, or there is no such owner.
        """
        with self._database.reading() as connection:
            owned = keys.c.tenant_id == _tenant_id(connection, tenant)
            row = connection.execute(_KEY_ROW.where(keys.c.id == key_id, owned)).one_or_none()
        if row is None:
            raise NotFound(f"there is no key {key_id!r:.40}")
        return Key(*row)

    def revoke(self, tenant: str | None, key_id: str, by: Principal) -> None:
        """Forget a key.

        Raises:
            NotFound: this owner has no such key, or there is no such owner.
        """
        with self._database.writing() as connection:
            owner = _changed(connection, tenant)
            gone = sa.delete(keys).where(keys.c.id == key_id, keys.c.tenant_id == owner)
            if connection.execute(gone).rowcount == 0:
                raise NotFound(f"there is no key {key_id!r:.40}")
            record(connection, by, "key.revoked", tenant, key_id)

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
