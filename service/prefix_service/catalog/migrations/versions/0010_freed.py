"""Bytes that tenants deleted and that are still on the disk."""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    """Make their table, and an index of deleted adapters. What was deleted before counts for nobody, and is soon
    collected."""
    op.create_table(
        "freed",
        sa.Column("tenant_id", sa.Integer, primary_key=True),
        sa.Column("since", sa.DateTime, primary_key=True),
        sa.Column("bytes", sa.BigInteger, nullable=False),
    )
    op.create_index("ix_freed_since", "freed", ["since"])
    op.create_index(
        "ix_adapters_hidden",
        "adapters",
        ["tenant_id"],
        sqlite_where=sa.text("deleted = 1"),
        postgresql_where=sa.text("deleted"),
    )
