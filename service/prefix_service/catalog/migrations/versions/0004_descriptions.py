"""Model cards, annotations, and what was used by hour."""

import sqlalchemy as sa
from alembic import op

from prefix_service.catalog.schema import Name

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Make their tables; no other table changes."""
    op.create_table(
        "descriptions",
        sa.Column(
            "version_id",
            sa.Integer,
            sa.ForeignKey("versions.id", ondelete="CASCADE", name="fk_descriptions_version_id"),
            primary_key=True,
        ),
        sa.Column("card", sa.Text, nullable=False),
        sa.Column("annotations", sa.JSON, nullable=False),
        sa.Column("bytes", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "usage",
        sa.Column("hour", sa.DateTime, primary_key=True),
        sa.Column(
            "tenant_id",
            sa.Integer,
            sa.ForeignKey("tenants.id", ondelete="CASCADE", name="fk_usage_tenant_id"),
            primary_key=True,
        ),
        sa.Column("adapter", Name, primary_key=True),
        sa.Column("version", sa.Integer, primary_key=True),
        sa.Column("key_id", Name, primary_key=True),
        *(
            sa.Column(name, sa.BigInteger, nullable=False)
            for name in ("requests", "bytes", "cold_loads", "prefix_tokens")
        ),
    )
    op.create_index("ix_usage_tenant_id_hour", "usage", ["tenant_id", "hour"])
