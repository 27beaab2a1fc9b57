"""Tenants, keys, adapters, versions, aliases."""

import sqlalchemy as sa
from alembic import op

from prefix_service.catalog.schema import Name

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Make the tables of the first release."""
    op.create_table(
        "tenants",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("name", Name, nullable=False),
        sa.Column("created", sa.DateTime, nullable=False, server_default=sa.func.now()),
        sa.UniqueConstraint("name", name="uq_tenants_name"),
    )
    op.create_table(
        "keys",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("tenant_id", sa.Integer, sa.ForeignKey("tenants.id", ondelete="CASCADE", name="fk_keys_tenant_id")),
        sa.Column("scope", sa.Text, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("hash", sa.Text, nullable=False),
        sa.Column("created", sa.DateTime, nullable=False, server_default=sa.func.now()),
        sa.Column("expires", sa.DateTime),
        sa.Column("last_used", sa.DateTime),
    )
    op.create_index("ix_keys_tenant_id", "keys", ["tenant_id"])
    op.create_table(
        "adapters",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column(
            "tenant_id",
            sa.Integer,
            sa.ForeignKey("tenants.id", ondelete="CASCADE", name="fk_adapters_tenant_id"),
            nullable=False,
        ),
        sa.Column("name", Name, nullable=False),
        sa.UniqueConstraint("tenant_id", "name", name="uq_adapters_tenant_id_name"),
    )
    op.create_table(
        "numbers",
        sa.Column("tenant", sa.Text, primary_key=True),
        sa.Column("adapter", sa.Text, primary_key=True),
        sa.Column("last", sa.Integer, nullable=False),
    )
    adapter_id = ("adapter_id", sa.Integer)
    op.create_table(
        "versions",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column(
            *adapter_id, sa.ForeignKey("adapters.id", ondelete="CASCADE", name="fk_versions_adapter_id"), nullable=False
        ),
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("digest", sa.Text, nullable=False),
        sa.Column("manifest", sa.Text, nullable=False),
        sa.Column("base_model", sa.Text),
        sa.Column("weights", sa.Text, nullable=False),
        sa.Column("weights_bytes", sa.BigInteger, nullable=False),
        sa.Column("weights_dtype", sa.Text, nullable=False),
        sa.Column("key_values", sa.Text, nullable=False),
        sa.Column("key_values_bytes", sa.BigInteger, nullable=False),
        sa.Column("created", sa.DateTime, nullable=False, server_default=sa.func.now()),
        sa.UniqueConstraint("adapter_id", "number", name="uq_versions_adapter_id_number"),
        sa.UniqueConstraint("adapter_id", "digest", name="uq_versions_adapter_id_digest"),
    )
    op.create_table(
        "aliases",
        sa.Column(
            *adapter_id,
            sa.ForeignKey("adapters.id", ondelete="CASCADE", name="fk_aliases_adapter_id"),
            primary_key=True,
        ),
        sa.Column("name", Name, primary_key=True),
        sa.Column("number", sa.Integer, nullable=False),
    )
