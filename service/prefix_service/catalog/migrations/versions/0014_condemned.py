"""Blobs that a collector is removing."""

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"


def upgrade() -> None:
    """Add the column."""
    op.add_column("garbage", sa.Column("condemned", sa.DateTime))
