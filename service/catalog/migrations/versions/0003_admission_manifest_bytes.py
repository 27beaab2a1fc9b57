"""The bytes of manifests, which count towards quotas."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Add the column, fill it, and have it in the index that totals are summed from."""
    op.add_column("versions", sa.Column("manifest_bytes", sa.BigInteger, nullable=False, server_default=sa.text("0")))
    is_postgresql = op.get_bind().dialect.name == "postgresql"
    octets = "octet_length(manifest)" if is_postgresql else "length(CAST(manifest AS BLOB))"
    op.execute(f"UPDATE versions SET manifest_bytes = {octets}")  # noqa: S608 - one of the two above
    op.drop_index("ix_versions_adapter_id_weights_bytes_key_values_bytes", "versions")
    sizes = ["adapter_id", "weights_bytes", "key_values_bytes", "manifest_bytes"]
    op.create_index("ix_versions_sizes", "versions", sizes)
