"""Blobs that a collector is removing, and the oldest release that can use this schema."""

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"


def upgrade() -> None:
    """Add the columns. A later migration that removes or renames what this release uses must set `usable_since` to its
    own revision; one that only adds leaves it."""
    op.add_column("garbage", sa.Column("condemned", sa.DateTime))
    op.add_column("catalog", sa.Column("usable_since", sa.Text))
    op.execute(sa.update(sa.table("catalog", sa.column("usable_since"))).values(usable_since=revision))
