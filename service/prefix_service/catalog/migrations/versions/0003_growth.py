"""Running totals, the bytes of manifests, and deletions that are carried out a slice at a time."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Add what keeps publishing, deleting and listing independent of how much there is."""
    for table in ("tenants", "adapters"):
        op.add_column(table, sa.Column("deleted", sa.Boolean, nullable=False, server_default=sa.false()))
        op.create_index(
            f"ix_{table}_deleted",
            table,
            ["deleted"],
            sqlite_where=sa.text("deleted = 1"),
            postgresql_where=sa.text("deleted"),
        )
    totals = {"tenants": ("adapters", "bytes"), "adapters": ("versions", "bytes"), "versions": ("manifest_bytes",)}
    for table, columns in totals.items():
        for column in columns:
            op.add_column(table, sa.Column(column, sa.BigInteger, nullable=False, server_default=sa.text("0")))
    _count()
    op.drop_index("ix_versions_adapter_id_weights_bytes_key_values_bytes", "versions")
    op.drop_index("ix_keys_tenant_id", "keys")
    op.create_index("ix_keys_tenant_id_created_id", "keys", ["tenant_id", "created", "id"])
    op.create_index("ix_garbage_since", "garbage", ["since"])


def _count() -> None:
    """Fill the totals, each table's from the rows below it, which are read once."""
    is_postgresql = op.get_bind().dialect.name == "postgresql"
    octets = "octet_length(manifest)" if is_postgresql else "length(CAST(manifest AS BLOB))"
    op.execute(f"UPDATE versions SET manifest_bytes = {octets}")  # noqa: S608 - one of the two above
    op.execute(
        "UPDATE adapters SET versions = counted.number, bytes = counted.total FROM (SELECT adapter_id, "
        "count(*) AS number, sum(weights_bytes + key_values_bytes + manifest_bytes) AS total FROM versions "
        "GROUP BY adapter_id) AS counted WHERE counted.adapter_id = adapters.id"
    )
    op.execute(
        "UPDATE tenants SET adapters = counted.number, bytes = counted.total FROM (SELECT tenant_id, "
        "count(*) AS number, sum(bytes) AS total FROM adapters GROUP BY tenant_id) AS counted "
        "WHERE counted.tenant_id = tenants.id"
    )
