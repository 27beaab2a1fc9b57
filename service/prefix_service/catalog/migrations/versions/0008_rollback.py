"""Where an alias pointed before."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0005"


def upgrade() -> None:
    """Add the column, and fill it from the audit log, which until now was the one place that knew."""
    op.add_column("aliases", sa.Column("previous", sa.Integer))
    is_postgresql = op.get_bind().dialect.name == "postgresql"
    before = "CAST(details->>'before' AS INTEGER)" if is_postgresql else "json_extract(details, '$.before')"
    # In one pass over the audit: an alias's latest move is the one that made it what it is.
    op.execute(
        "UPDATE aliases SET previous = moved.previous FROM (SELECT aliases.adapter_id, aliases.name, "  # noqa: S608 - one of the two above
        f"{before} AS previous FROM aliases JOIN adapters ON adapters.id = aliases.adapter_id "
        "JOIN tenants ON tenants.id = adapters.tenant_id JOIN (SELECT tenant_id, target, max(id) AS id FROM audit "
        "WHERE action = 'alias.moved' GROUP BY tenant_id, target) AS latest ON latest.tenant_id = tenants.id "
        "AND latest.target = tenants.name || '/' || adapters.name || '@' || aliases.name "
        "JOIN audit ON audit.id = latest.id) AS moved "
        "WHERE moved.adapter_id = aliases.adapter_id AND moved.name = aliases.name"
    )
