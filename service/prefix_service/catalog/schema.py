"""The catalog's tables; `migrations/` makes them, and a test holds the two together."""

from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.dialects import sqlite

metadata = sa.MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    }
)

# Names are compared and ordered byte by byte, also where a database would rather follow a language.
Name = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")

# As SQLite's own clock writes it, without fractions: texts of the same moment must be equal.
_Made = sa.DateTime().with_variant(sqlite.DATETIME(truncate_microseconds=True), "sqlite")  # type: ignore[no-untyped-call]

# SQLite counts its rows by this key itself, without another index.
Revision = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


_DELETED: Final[dict[str, Any]] = {"sqlite_where": sa.text("deleted = 1"), "postgresql_where": sa.text("deleted")}


def _being_removed() -> sa.Index:
    """Finds the rows that were deleted, of which the collector removes what hangs on them."""
    return sa.Index(None, "deleted", **_DELETED)


# A quota of NULL is none. `adapters` and `bytes` are running totals, which every write transaction keeps.
# Whatever is `deleted` has a name that nobody can ask for, and its rows are removed a slice at a time.
tenants = sa.Table(
    "tenants",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("name", Name, nullable=False, unique=True),
    sa.Column("created", sa.DateTime, nullable=False, server_default=sa.func.now()),
    sa.Column("max_adapters", sa.BigInteger),
    sa.Column("max_bytes", sa.BigInteger),
    sa.Column("requests_per_second", sa.BigInteger),
    sa.Column("adapters", sa.BigInteger, nullable=False, server_default=sa.text("0")),
    sa.Column("bytes", sa.BigInteger, nullable=False, server_default=sa.text("0")),
    sa.Column("deleted", sa.Boolean, nullable=False, server_default=sa.false()),
    _being_removed(),
)

keys = sa.Table(
    "keys",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("tenant_id", sa.ForeignKey("tenants.id", ondelete="CASCADE")),
    sa.Column("scope", sa.Text, nullable=False),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("hash", sa.Text, nullable=False),
    sa.Column("created", _Made, nullable=False, server_default=sa.func.now()),
    sa.Column("expires", sa.DateTime),
    sa.Column("last_used", sa.DateTime),
    sa.Index(None, "tenant_id", "created", "id"),
)

# `versions` and `bytes` are running totals, too; `used` is one of the requests that usage has counted, also those whose
# hours have been removed since.
adapters = sa.Table(
    "adapters",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("tenant_id", sa.ForeignKey("tenants.id", ondelete="CASCADE"), nullable=False),
    sa.Column("name", Name, nullable=False),
    sa.Column("versions", sa.BigInteger, nullable=False, server_default=sa.text("0")),
    sa.Column("bytes", sa.BigInteger, nullable=False, server_default=sa.text("0")),
    sa.Column("deleted", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("used", sa.BigInteger, nullable=False, server_default=sa.text("0")),
    sa.UniqueConstraint("tenant_id", "name"),
    sa.Index("ix_adapters_tenant_id_used_name", "tenant_id", sa.text("used DESC"), "name"),
    _being_removed(),
    # What a tenant deleted and the collector has not removed yet, counted without a look at what others deleted.
    sa.Index("ix_adapters_hidden", "tenant_id", **_DELETED),
)

# By name and without a foreign key: a number is never given twice, not even after a deletion.
numbers = sa.Table(
    "numbers",
    metadata,
    sa.Column("tenant", sa.Text, primary_key=True),
    sa.Column("adapter", sa.Text, primary_key=True),
    sa.Column("last", sa.Integer, nullable=False),
)

versions = sa.Table(
    "versions",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("adapter_id", sa.ForeignKey("adapters.id", ondelete="CASCADE"), nullable=False),
    sa.Column("number", sa.Integer, nullable=False),
    sa.Column("digest", sa.Text, nullable=False),
    sa.Column("manifest", sa.Text, nullable=False),
    sa.Column("base_model", sa.Text),
    sa.Column("weights", sa.Text, nullable=False, index=True),
    sa.Column("weights_bytes", sa.BigInteger, nullable=False),
    sa.Column("weights_dtype", sa.Text, nullable=False),
    sa.Column("key_values", sa.Text, nullable=False, index=True),
    sa.Column("key_values_bytes", sa.BigInteger, nullable=False),
    sa.Column("created", _Made, nullable=False, server_default=sa.func.now()),
    sa.Column("manifest_bytes", sa.BigInteger, nullable=False, server_default=sa.text("0")),
    sa.UniqueConstraint("adapter_id", "number"),
    sa.UniqueConstraint("adapter_id", "digest"),
)

# What a version's digest does not cover, in a table of its own: whoever fetches a prefix reads the version's row.
# `bytes` is the size of all of it, texts in UTF-8, which counts in the totals of adapter and tenant. Without a row all
# of it is empty. `config_file` is NULL where no file was uploaded, or to an older release.
descriptions = sa.Table(
    "descriptions",
    metadata,
    sa.Column("version_id", sa.ForeignKey("versions.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("card", sa.Text, nullable=False),
    sa.Column("annotations", sa.JSON, nullable=False),
    sa.Column("bytes", sa.BigInteger, nullable=False),
    sa.Column("fingerprint", sa.Text, nullable=False, server_default=""),
    sa.Column("config_file", sa.LargeBinary),
)

# `previous` is the version that the alias named before `number`, for whoever moves it back; null if there is none.
aliases = sa.Table(
    "aliases",
    metadata,
    sa.Column("adapter_id", sa.ForeignKey("adapters.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("name", Name, primary_key=True),
    sa.Column("number", sa.Integer, nullable=False),
    sa.Column("previous", sa.Integer),
)

# Blobs that a deletion let go, or that are about to be named, and since when: their bytes stay for the grace period.
# `condemned` is the moment at which a collector began to remove them; it is NULL otherwise.
garbage = sa.Table(
    "garbage",
    metadata,
    sa.Column("digest", sa.Text, primary_key=True),
    sa.Column("since", sa.DateTime, nullable=False, server_default=sa.func.now(), index=True),
    sa.Column("condemned", sa.DateTime),
)

# Bytes that deletions let go, by tenant and second: they count towards the tenant's quota until their blobs have been
# collected. Without a foreign key: a row whose tenant is gone is forgotten like any other.
freed = sa.Table(
    "freed",
    metadata,
    sa.Column("tenant_id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("since", _Made, primary_key=True, index=True),
    sa.Column("bytes", sa.BigInteger, nullable=False),
)

# `tenant` is a name for people; `tenant_id` says who may read the row, so a namesake made later may not. `key_name` is
# that of the key, which may have been revoked since; NULL without a key.
audit = sa.Table(
    "audit",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("at", sa.DateTime, nullable=False, server_default=sa.func.now()),
    sa.Column("tenant_id", sa.ForeignKey("tenants.id", ondelete="SET NULL")),
    sa.Column("tenant", sa.Text),
    sa.Column("actor", sa.Text, nullable=False),
    sa.Column("key_id", sa.Text, nullable=False),
    sa.Column("action", sa.Text, nullable=False),
    sa.Column("target", sa.Text, nullable=False),
    sa.Column("details", sa.JSON, nullable=False),
    sa.Column("key_name", sa.Text),
    sa.Index(None, "tenant_id", "id"),
)

# One row: the random id of this catalog, which a backup keeps, the revision of its latest change, and on PostgreSQL,
# from the first start on, whose it is (`claim.py`). Releases that know the schema `usable_since`, or a later one, can
# use this schema, which may be newer than theirs.
catalog = sa.Table(
    "catalog",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("revision", sa.BigInteger, nullable=False),
    sa.Column("key_secret", sa.Text),
    sa.Column("blob_store", sa.Text),
    sa.Column("usable_since", sa.Text),
)

# What `changes.py` stores. `tenant_id` says who may read the row, as in `audit`; without a foreign key, since the row
# outlives its tenant. The columns behind it are what the types of changes have; a type leaves the others empty.
changes = sa.Table(
    "changes",
    metadata,
    sa.Column("revision", Revision, primary_key=True, autoincrement=False),
    sa.Column("at", sa.DateTime, nullable=False, server_default=sa.func.now()),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("tenant_id", sa.Integer),
    sa.Column("tenant", sa.Text),
    sa.Column("key_id", sa.Text),
    sa.Column("adapter", sa.Text),
    sa.Column("alias", sa.Text),
    sa.Column("version", sa.Integer),
    sa.Column("digest", sa.Text),
    sa.Index(None, "tenant_id", "revision"),
)

# By hour, named by its beginning. Adapter "", version 0 and key "" are what a tenant used beyond the rows that one hour
# may have. Names are those of the hour; an adapter's numbers are never given twice, so they mean one version each.
usage = sa.Table(
    "usage",
    metadata,
    sa.Column("hour", _Made, primary_key=True),
    sa.Column("tenant_id", sa.ForeignKey("tenants.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("adapter", Name, primary_key=True),
    sa.Column("version", sa.Integer, primary_key=True),
    sa.Column("key_id", Name, primary_key=True),
    sa.Column("requests", sa.BigInteger, nullable=False),
    sa.Column("bytes", sa.BigInteger, nullable=False),
    sa.Column("cold_loads", sa.BigInteger, nullable=False),
    sa.Column("prefix_tokens", sa.BigInteger, nullable=False),
    sa.Index(None, "tenant_id", "hour"),
)

# Sessions of the page at /ui; `hash` is the SHA-256 of the id that the browser's cookie has.
sessions = sa.Table(
    "sessions",
    metadata,
    sa.Column("hash", sa.Text, primary_key=True),
    sa.Column("key_id", sa.ForeignKey("keys.id", ondelete="CASCADE"), nullable=False),
    sa.Column("began", sa.DateTime, nullable=False),
    sa.Column("used", sa.DateTime, nullable=False, index=True),
    sa.Index(None, "key_id", "began"),
)

# A row for each process of each replica; `seen` is its latest sign of life.
replicas = sa.Table(
    "replicas",
    metadata,
    sa.Column("process", sa.Text, primary_key=True),
    sa.Column("replica", sa.Text, nullable=False),
    sa.Column("address", sa.Text),
    sa.Column("release", sa.Text, nullable=False),
    sa.Column("started", sa.DateTime, nullable=False),
    sa.Column("seen", sa.DateTime, nullable=False, index=True),
    sa.Column("revision", sa.BigInteger, nullable=False),
    sa.Column("adapters", sa.BigInteger, nullable=False),
    sa.Column("device_bytes", sa.BigInteger, nullable=False),
    sa.Column("host_bytes", sa.BigInteger, nullable=False),
)
