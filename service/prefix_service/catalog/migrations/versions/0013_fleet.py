"""Whose a catalog is, and the replicas that serve it."""

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0011"


def upgrade() -> None:
    """Add the columns and the table. The next start on PostgreSQL notes whose the catalog is."""
    for name in ("key_secret", "blob_store"):
        op.add_column("catalog", sa.Column(name, sa.Text))
    op.create_table(
        "replicas",
        sa.Column("process", sa.Text, primary_key=True),
        sa.Column("replica", sa.Text, nullable=False),
        sa.Column("address", sa.Text),
        sa.Column("release", sa.Text, nullable=False),
        sa.Column("started", sa.DateTime, nullable=False),
        sa.Column("seen", sa.DateTime, nullable=False),
        sa.Column("revision", sa.BigInteger, nullable=False),
        sa.Column("adapters", sa.BigInteger, nullable=False),
        sa.Column("device_bytes", sa.BigInteger, nullable=False),
        sa.Column("host_bytes", sa.BigInteger, nullable=False),
    )
    op.create_index("ix_replicas_seen", "replicas", ["seen"])
