"""The catalog's id and revision, and its typed changes."""

import secrets

import sqlalchemy as sa
from alembic import op

from prefix_service.catalog.schema import Revision

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    """Make their tables; no other table changes. Nobody has followed this catalog by revisions so far: they begin."""
    made = op.create_table(
        "catalog",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("revision", sa.BigInteger, nullable=False),
    )
    op.bulk_insert(made, [{"id": secrets.token_hex(16), "revision": 0}])
    op.create_table(
        "changes",
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
    )
    op.create_index("ix_changes_tenant_id_revision", "changes", ["tenant_id", "revision"])
