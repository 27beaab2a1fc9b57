"""The running totals of adapters and tenants are the sums of their rows, whatever is published and deleted."""

import contextlib
import hashlib
import tempfile
from pathlib import Path

import sqlalchemy as sa
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from prefix_service.catalog.database import Database
from prefix_service.catalog.deletions import Deletions
from prefix_service.catalog.descriptions import Descriptions
from prefix_service.catalog.records import NewVersion, Quotas
from prefix_service.catalog.schema import adapters, descriptions, tenants, versions
from prefix_service.catalog.tenants import Tenants
from prefix_service.errors import Conflict, NotFound, QuotaExceeded
from prefix_service.prefix.description import Description
from prefix_service.prefix.references import parse_reference
from tests.catalog.conftest import BY, HoldingCatalog

TENANTS = st.sampled_from(["acme", "beta"])
ADAPTERS = st.sampled_from("abc")
NUMBERS = st.integers(1, 6)
_TEXT = st.sampled_from(["", "x", "é" * 9])
DESCRIPTIONS = st.builds(
    Description, _TEXT, st.dictionaries(st.sampled_from("kl"), _TEXT), _TEXT, st.binary(max_size=9)
)

_NBYTES = versions.c.weights_bytes + versions.c.key_values_bytes + versions.c.manifest_bytes


class Totals(RuleBasedStateMachine):
    """Publishes, moves aliases and deletes, with and without quotas, while deleted rows are removed."""

    def __init__(self) -> None:
        super().__init__()
        self._folder = tempfile.TemporaryDirectory()
        self._database = Database(Path(self._folder.name) / "catalog.sqlite")
        self._catalog, self._tenants = HoldingCatalog(self._database), Tenants(self._database)
        self._descriptions = Descriptions(self._database)

    def teardown(self) -> None:
        self._database.close()
        self._folder.cleanup()

    @rule(
        tenant=TENANTS,
        adapter=ADAPTERS,
        word=st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=3),
        description=DESCRIPTIONS,
    )
    def publish(self, tenant: str, adapter: str, word: str, description: Description) -> None:
        """Publishes content, which may be known and may exceed a quota."""
        digest = hashlib.sha256(word.encode()).hexdigest()
        new = NewVersion(digest, f"é{word}", None, digest, len(word), "float32", digest, 7)
        with contextlib.suppress(QuotaExceeded):
            self._catalog.add_version(tenant, adapter, new, BY, description=description, make_tenant=True)

    @rule(tenant=TENANTS, adapter=ADAPTERS, number=NUMBERS, description=DESCRIPTIONS)
    def describe(self, tenant: str, adapter: str, number: int, description: Description) -> None:
        """Gives a version another description, which may be longer, shorter or empty."""
        with contextlib.suppress(NotFound, QuotaExceeded):
            version = self._catalog.resolve(tenant, parse_reference(f"{adapter}@{number}"))
            self._descriptions.change(version, BY, "card", lambda _: description)

    @rule(tenant=TENANTS, adapter=ADAPTERS, number=NUMBERS)
    def point(self, tenant: str, adapter: str, number: int) -> None:
        """Points an alias at a version, which keeps the version from being deleted."""
        with contextlib.suppress(NotFound):
            self._catalog.put_alias(tenant, adapter, "prod", number, BY)

    @rule(tenant=TENANTS, adapter=ADAPTERS, selector=st.none() | NUMBERS)
    def delete(self, tenant: str, adapter: str, selector: int | None) -> None:
        """Deletes a version, perhaps the last one, or an adapter."""
        reference = adapter if selector is None else f"{adapter}@{selector}"
        with contextlib.suppress(NotFound, Conflict):
            self._catalog.delete(tenant, parse_reference(reference), BY)

    @rule(tenant=TENANTS)
    def delete_tenant(self, tenant: str) -> None:
        """Deletes a tenant with everything that it has."""
        with contextlib.suppress(NotFound):
            self._tenants.delete(tenant, BY)

    @rule(tenant=TENANTS, quotas=st.sampled_from([Quotas(), Quotas(max_adapters=1), Quotas(max_bytes=30)]))
    def limit(self, tenant: str, quotas: Quotas) -> None:
        """Sets quotas, which change nothing of what exists."""
        self._tenants.put(tenant, BY, quotas)

    @rule()
    def remove(self) -> None:
        """Removes a slice of what was deleted."""
        Deletions(self._database).remove_slice()

    @invariant()
    def totals_are_sums(self) -> None:
        """Checks that totals are the sums of what was not deleted, with descriptions and the UTF-8 bytes of
        manifests."""
        count = sa.func.count
        described = versions.outerjoin(descriptions, descriptions.c.version_id == versions.c.id)
        total = sa.func.sum(_NBYTES + sa.func.coalesce(descriptions.c.bytes, 0))
        by_adapter = sa.select(versions.c.adapter_id, count(), total).select_from(described)
        by_adapter = by_adapter.group_by(versions.c.adapter_id)
        by_tenant = (
            sa.select(adapters.c.tenant_id, count(), sa.func.sum(adapters.c.bytes))
            .where(sa.not_(adapters.c.deleted))
            .group_by(adapters.c.tenant_id)
        )
        with self._database.reading() as connection:
            for table, counted, columns in (
                (adapters, by_adapter, ("versions", "bytes")),
                (tenants, by_tenant, ("adapters", "bytes")),
            ):
                sums = {row[0]: tuple(row[1:]) for row in connection.execute(counted)}
                present = sa.select(table.c.id, *(table.c[name] for name in columns)).where(sa.not_(table.c.deleted))
                for row in connection.execute(present):
                    assert tuple(row[1:]) == sums.get(row.id, (0, 0)), (table.name, row)
            manifests = connection.execute(sa.select(versions.c.manifest, versions.c.manifest_bytes)).all()
        assert all(len(manifest.encode()) == nbytes for manifest, nbytes in manifests)


TestTotals = Totals.TestCase
TestTotals.settings = settings(max_examples=20, stateful_step_count=30)
