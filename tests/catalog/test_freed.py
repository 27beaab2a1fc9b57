"""`catalog.freed`: deleted bytes count until they are collected, so versions and deleted bytes together take at most
twice the quota of the disk."""

import pytest
import sqlalchemy as sa

from prefix_service.catalog.catalog import Catalog
from prefix_service.catalog.database import Database
from prefix_service.catalog.deletions import Deletions
from prefix_service.catalog.descriptions import Descriptions
from prefix_service.catalog.garbage import SLICE, Garbage
from prefix_service.catalog.records import NewVersion, Quotas, Version
from prefix_service.catalog.schema import adapters, versions
from prefix_service.catalog.schema import tenants as tenants_table
from prefix_service.catalog.tenants import Tenants
from prefix_service.errors import QuotaExceeded
from prefix_service.prefix.description import Description
from prefix_service.prefix.references import parse_reference
from tests.catalog.conftest import BY, remove_deleted

GRACE = 3600.0
BLOBS = 30
QUOTA = 2 * (BLOBS + 2)
"""Room for two versions, with their manifests."""


def version(n: int) -> NewVersion:
    """Returns version `n`, with 30 bytes of blobs and 2 of the manifest."""
    return NewVersion(f"d{n}", "{}", None, f"w{n}", 10, "bfloat16", f"kv{n}", 20)


def publish(catalog: Catalog, adapter: str, n: int, tenant: str = "acme") -> Version:
    return catalog.add_version(tenant, adapter, version(n), BY, make_tenant=True)[0]


def publish_and_delete(catalog: Catalog, first: int, *, whole: bool) -> int:
    """Publishes and deletes until a publication is refused, a hundred times at most; returns how often none was."""
    for n in range(100):
        try:
            new = publish(catalog, f"a{n}" if whole else "a", first + n)
        except QuotaExceeded:
            return n
        catalog.delete("acme", parse_reference(f"a{n}" if whole else f"a@{new.number}"), BY)
    return 100


@pytest.mark.parametrize("whole", [False, True], ids=["versions", "adapters"])
@pytest.mark.parametrize("is_removed", [False, True], ids=["rows-there", "rows-removed"])
def test_versions_and_what_was_deleted_take_twice_the_quota(
    catalog: Catalog, tenants: Tenants, garbage: Garbage, database: Database, whole: bool, is_removed: bool
) -> None:
    """Versions and deleted bytes together stay within twice the quota, however versions are deleted, until the deleted
    ones are collected."""
    tenants.put("acme", BY, Quotas(max_bytes=QUOTA))
    publish(catalog, "a", 0)
    if not whole:
        publish(catalog, "kept", 0)
        catalog.delete("acme", parse_reference("kept"), BY)
    remove_deleted(database)
    assert 0 < publish_and_delete(catalog, 1, whole=whole) < 5
    if is_removed:
        remove_deleted(database)
    found = tenants.get("acme")
    assert QUOTA < found.bytes + found.uncollected <= 2 * QUOTA
    assert [one.uncollected for one in tenants.listed("", 9)] == [found.uncollected]
    remove_deleted(database)
    garbage.forget(garbage.expired(GRACE))
    with pytest.raises(QuotaExceeded, match=r"'acme' has 32 of 64 bytes, (90|60) bytes that it deleted are still on"):
        publish(catalog, "late", 99)
    garbage.forget(garbage.expired(-60))  # as if a minute had gone by, and the grace were over
    assert tenants.get("acme").uncollected == 0
    publish(catalog, "late", 99)


def test_rooms_know_what_waits(catalog: Catalog, tenants: Tenants) -> None:
    """The room that an upload gets, before it arrives and before it is encoded, has the deleted bytes."""
    tenants.put("acme", BY, Quotas(max_bytes=QUOTA))
    publish_and_delete(catalog, 0, whole=True)
    room = catalog.room("acme", "b")
    assert (room.left, room.quota) == (QUOTA, QUOTA)
    assert room.uncollected == tenants.get("acme").uncollected
    with pytest.raises(QuotaExceeded, match="still on the disk, and this version takes 32"):
        catalog.find("acme", "b", "d99", 32, BY)


def test_the_same_content_and_descriptions_need_no_room(
    catalog: Catalog, tenants: Tenants, descriptions: Descriptions
) -> None:
    """Known content and descriptions bring no blobs, so deleted bytes do not refuse them."""
    tenants.put("acme", BY, Quotas(max_bytes=QUOTA))
    kept = publish(catalog, "kept", 0)
    publish_and_delete(catalog, 1, whole=True)
    assert publish(catalog, "kept", 0) == kept
    descriptions.change(kept, BY, "card", lambda _: Description("0123456789"))


def test_without_a_quota_there_is_no_limit(catalog: Catalog, tenants: Tenants) -> None:
    """Deletions of a tenant without a quota are never refused, and are counted, since a quota may come."""
    assert publish_and_delete(catalog, 0, whole=False) == 100
    assert tenants.get("acme").uncollected >= 99 * BLOBS


def test_tenants_count_by_themselves(catalog: Catalog, tenants: Tenants, database: Database) -> None:
    """Deleted bytes count for each tenant that deleted them; a tenant that was made again has deleted nothing."""
    for tenant in ("acme", "beta"):
        publish(catalog, "a", 0, tenant)
        publish(catalog, "b", 0, tenant)
    catalog.delete("acme", parse_reference("a"), BY)
    assert [one.uncollected for one in tenants.listed("", 9)] == [BLOBS + 2, 0]
    remove_deleted(database)
    assert [one.uncollected for one in tenants.listed("", 9)] == [BLOBS, 0]
    tenants.delete("acme", BY)
    tenants.put("acme", BY)
    remove_deleted(database)
    assert [one.uncollected for one in tenants.listed("", 9)] == [0, 0]


def test_an_adapter_counts_once_while_its_rows_are_removed(
    catalog: Catalog, tenants: Tenants, database: Database
) -> None:
    """While slices remove a deleted adapter, removed versions count as deleted bytes, and the others by the adapter's
    total."""
    publish(catalog, "a", 0)
    more = 2 * SLICE
    with database.writing() as connection:
        row = connection.execute(sa.select(versions)).one()._asdict()
        row.pop("id")
        rows = [row | {"number": 2 + n, "digest": f"d{1 + n}"} for n in range(more)]
        connection.execute(sa.insert(versions), rows)
        total = {"versions": more + 1, "bytes": (more + 1) * (BLOBS + 2)}
        connection.execute(sa.update(adapters).values(total))
        connection.execute(sa.update(tenants_table).values(bytes=total["bytes"]))
    catalog.delete("acme", parse_reference("a"), BY)
    seen = [tenants.get("acme").uncollected]
    while Deletions(database).remove_slice():
        seen.append(tenants.get("acme").uncollected)
    assert (seen[0], seen[-1]) == ((more + 1) * (BLOBS + 2), (more + 1) * BLOBS)
    assert len(seen) > 3
    assert all(seen[-1] <= count <= seen[0] for count in seen)


def test_bytes_of_a_version_that_did_not_come_into_being(catalog: Catalog, tenants: Tenants) -> None:
    """Abandoned bytes count for their tenant, unless their content is known after all."""
    publish(catalog, "a", 0)
    acme = tenants.require("acme")
    catalog.abandon(acme, "a", "d0", BLOBS)
    assert tenants.get("acme").uncollected == 0
    catalog.abandon(acme, "a", "d1", BLOBS)
    catalog.abandon(acme, "b", "d0", BLOBS)
    assert tenants.get("acme").uncollected == 2 * BLOBS


def test_a_tenant_that_was_made_again_has_abandoned_nothing(catalog: Catalog, tenants: Tenants) -> None:
    """Bytes that its namesake stored before it was deleted count for nobody."""
    tenants.put("acme", BY)
    gone = tenants.require("acme")
    tenants.delete("acme", BY)
    catalog.abandon(gone, "a", "d0", BLOBS)
    tenants.put("acme", BY)
    catalog.abandon(gone, "a", "d1", BLOBS)
    assert tenants.get("acme").uncollected == 0
