"""Fingerprints of base models, uploaded config files, how often adapters are used, and names of keys in the audit."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Add their columns, and fill those of what was there: uses from the hours that are kept, names of keys from the
    keys, and those of revoked ones from the audit of their making."""
    op.add_column("descriptions", sa.Column("fingerprint", sa.Text, nullable=False, server_default=""))
    op.add_column("descriptions", sa.Column("config_file", sa.LargeBinary))
    op.add_column("adapters", sa.Column("used", sa.BigInteger, nullable=False, server_default=sa.text("0")))
    op.execute(
        "UPDATE adapters SET used = counted.total FROM (SELECT tenant_id, adapter, sum(requests) AS total FROM usage "
        "GROUP BY tenant_id, adapter) AS counted "
        "WHERE counted.tenant_id = adapters.tenant_id AND counted.adapter = adapters.name"
    )
    op.create_index("ix_adapters_tenant_id_used_name", "adapters", ["tenant_id", sa.text("used DESC"), "name"])
    op.add_column("audit", sa.Column("key_name", sa.Text))
    op.execute("UPDATE audit SET key_name = keys.name FROM keys WHERE keys.id = audit.key_id")
    is_postgresql = op.get_bind().dialect.name == "postgresql"
    name = "details ->> 'name'" if is_postgresql else "json_extract(details, '$.name')"
    op.execute(
        f"UPDATE audit SET key_name = made.name FROM (SELECT target, {name} AS name FROM audit "  # noqa: S608 - one of the two above
        "WHERE action = 'key.created') AS made WHERE made.target = audit.key_id AND audit.key_name IS NULL"
    )
