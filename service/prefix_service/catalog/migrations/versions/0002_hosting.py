"""Quotas, the audit, and what a deletion let go."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add what hosting many tenants needs."""
    for quota in ("max_adapters", "max_bytes", "requests_per_second"):
        op.add_column("tenants", sa.Column(quota, sa.BigInteger))
    op.create_index("ix_versions_weights", "versions", ["weights"])
    op.create_index("ix_versions_key_values", "versions", ["key_values"])
    sizes = ["adapter_id", "weights_bytes", "key_values_bytes"]
    op.create_index("ix_versions_adapter_id_weights_bytes_key_values_bytes", "versions", sizes)
    op.create_table(
        "garbage",
        sa.Column("digest", sa.Text, primary_key=True),
        sa.Column("since", sa.DateTime, nullable=False, server_default=sa.func.now()),
    )
    op.create_table(
        "audit",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("at", sa.DateTime, nullable=False, server_default=sa.func.now()),
        sa.Column("tenant_id", sa.Integer, sa.ForeignKey("tenants.id", ondelete="SET NULL", name="fk_audit_tenant_id")),
        sa.Column("tenant", sa.Text),
        sa.Column("actor", sa.Text, nullable=False),
        sa.Column("key_id", sa.Text, nullable=False),
        sa.Column("action", sa.Text, nullable=False),
        sa.Column("target", sa.Text, nullable=False),
        sa.Column("details", sa.JSON, nullable=False),
    )
    op.create_index("ix_audit_tenant_id_id", "audit", ["tenant_id", "id"])
