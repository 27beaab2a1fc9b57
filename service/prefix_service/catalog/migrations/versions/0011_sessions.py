"""Sessions of the page."""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"


def upgrade() -> None:
    """Make their table; no other table changes."""
    op.create_table(
        "sessions",
        sa.Column("hash", sa.Text, primary_key=True),
        sa.Column(
            "key_id",
            sa.Text,
            sa.ForeignKey("keys.id", ondelete="CASCADE", name="fk_sessions_key_id"),
            nullable=False,
        ),
        sa.Column("began", sa.DateTime, nullable=False),
        sa.Column("used", sa.DateTime, nullable=False),
    )
    op.create_index("ix_sessions_used", "sessions", ["used"])
    op.create_index("ix_sessions_key_id_began", "sessions", ["key_id", "began"])
