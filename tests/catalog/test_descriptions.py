"""`catalog.descriptions`: cards, annotations and fingerprints of versions, and how their bytes count."""

from dataclasses import replace

import pytest
import sqlalchemy as sa

from prefix_service.catalog import deletions
from prefix_service.catalog.audit import AuditLog
from prefix_service.catalog.catalog import Catalog
from prefix_service.catalog.database import Database
from prefix_service.catalog.deletions import Deletions
from prefix_service.catalog.descriptions import Descriptions
from prefix_service.catalog.records import Principal, Quotas, Version
from prefix_service.catalog.schema import descriptions as table
from prefix_service.catalog.tenants import Tenants
from prefix_service.errors import NotFound, PreconditionFailed, QuotaExceeded, Unauthenticated
from prefix_service.prefix.description import Description
from prefix_service.prefix.references import parse_reference
from tests.catalog.conftest import BY, Content, remove_deleted

CARD = Description("# Card é", {"run": "17"})
BYTES = len("# Card é".encode()) + len("run17")


@pytest.fixture
def version(catalog: Catalog, content: Content) -> Version:
    """Returns a version of acme/a with the description CARD."""
    return catalog.add_version("acme", "a", content("x"), BY, description=CARD, make_tenant=True)[0]


def rows(database: Database) -> int:
    with database.reading() as connection:
        return connection.execute(sa.select(sa.func.count()).select_from(table)).scalar_one()


def test_a_version_has_the_description_that_it_was_published_with(
    catalog: Catalog, descriptions: Descriptions, version: Version, content: Content
) -> None:
    """A version has the description of its publication; one without has an empty one."""
    assert descriptions.get(version) == CARD
    bare = catalog.add_version("acme", "a", content("y"), BY)[0]
    assert descriptions.get(bare) == Description()
    assert (descriptions.get(version), version.number, bare.number) == (CARD, 1, 2)


def test_publishing_again_replaces_nothing(
    catalog: Catalog, descriptions: Descriptions, tenants: Tenants, version: Version, content: Content
) -> None:
    """Publishing known content with another description changes neither what is stored nor what is counted."""
    used = tenants.get("acme").bytes
    again = catalog.add_version("acme", "a", content("x"), BY, description=Description("another"))
    assert again == (version, False)
    assert (descriptions.get(version), tenants.get("acme").bytes) == (CARD, used)


def test_its_bytes_count(catalog: Catalog, tenants: Tenants, descriptions: Descriptions, version: Version) -> None:
    """The bytes of a description count towards the tenant's bytes, also after each change, until the version is
    deleted."""
    assert tenants.get("acme").bytes == version.nbytes + BYTES
    descriptions.change(version, BY, "card", lambda old: replace(old, card="longer than it was"))
    assert tenants.get("acme").bytes == version.nbytes + len("longer than it was") + len("run17")
    descriptions.change(version, BY, "card", lambda old: replace(old, card=""))
    assert tenants.get("acme").bytes == version.nbytes + len("run17")
    catalog.delete("acme", parse_reference("a@1"), BY)
    assert tenants.get("acme").bytes == 0


def test_a_quota_bounds_it(
    catalog: Catalog, tenants: Tenants, descriptions: Descriptions, version: Version, content: Content
) -> None:
    """A description that exceeds the quota is refused and changes nothing; a shorter one is accepted also above the
    quota."""
    tenants.put("acme", BY, Quotas(max_bytes=version.nbytes + BYTES + 1))
    with pytest.raises(QuotaExceeded, match="this card takes another 2: delete versions"):
        descriptions.change(version, BY, "card", lambda old: replace(old, card=old.card + "xx"))
    assert descriptions.get(version) == CARD
    descriptions.change(version, BY, "card", lambda old: replace(old, card=old.card + "x"))
    tenants.put("acme", BY, Quotas(max_bytes=10))
    descriptions.change(version, BY, "card", lambda _: CARD)
    assert descriptions.get(version) == CARD
    tenants.put("acme", BY, Quotas(max_bytes=2 * version.nbytes + BYTES))
    with pytest.raises(QuotaExceeded):
        catalog.add_version("acme", "a", content("y"), BY, description=Description("x"))
    assert catalog.add_version("acme", "a", content("y"), BY)[1]


def test_config_file_and_fingerprint_are_stored_and_counted(
    catalog: Catalog, descriptions: Descriptions, tenants: Tenants, content: Content
) -> None:
    """A config file of any bytes is stored and counted, and stays if another part of the description is replaced."""
    whole = Description("é", {"run": "17"}, '{"architecture":"x"}', b"\xff\x00 {}")
    version = catalog.add_version("acme", "a", content("x"), BY, description=whole, make_tenant=True)[0]
    assert descriptions.get(version) == whole
    assert tenants.get("acme").bytes == version.nbytes + 2 + 5 + 20 + 5
    changed = descriptions.change(version, BY, "base-model", lambda old: replace(old, fingerprint=""))
    assert descriptions.get(version) == changed == replace(whole, fingerprint="")
    assert tenants.get("acme").bytes == version.nbytes + 2 + 5 + 5


def test_a_change_that_is_refused_changes_nothing(descriptions: Descriptions, version: Version) -> None:
    """`change` gets the stored description; its error is raised, and nothing is changed."""
    seen = []

    def refuse(current: Description) -> Description:
        seen.append(current)
        raise PreconditionFailed("another")

    with pytest.raises(PreconditionFailed):
        descriptions.change(version, BY, "card", refuse)
    assert seen == [CARD]
    assert descriptions.get(version) == CARD


def test_who_has_lost_the_authority_changes_nothing(descriptions: Descriptions, version: Version) -> None:
    """A change by a revoked key is refused in the transaction that writes."""
    gone = Principal("0" * 16, "acme", "write", 1)
    with pytest.raises(Unauthenticated):
        descriptions.change(version, gone, "card", lambda _: Description())
    assert descriptions.get(version) == CARD


def test_changes_are_in_the_audit(descriptions: Descriptions, audit: AuditLog, version: Version) -> None:
    """The audit says which part of a description was changed, without its text; a change to the same text has no
    entry."""
    descriptions.change(version, BY, "annotations", lambda old: replace(old, annotations={"run": "18"}))
    before = audit.listed("acme", before=None, limit=9)
    assert (before[0].action, before[0].target) == ("annotations.changed", "acme/a@1")
    assert before[0].details == {"bytes": BYTES}
    descriptions.change(version, BY, "annotations", lambda old: old)
    assert audit.listed("acme", before=None, limit=9) == before


def test_what_was_deleted_has_none(
    catalog: Catalog, descriptions: Descriptions, database: Database, version: Version, content: Content
) -> None:
    """A deleted version has no description, and neither has a later version of the same name."""
    catalog.delete("acme", parse_reference("a@1"), BY)
    assert rows(database) == 0
    with pytest.raises(NotFound, match="there is no acme/a@1"):
        descriptions.get(version)
    with pytest.raises(NotFound, match="there is no acme/a@1"):
        descriptions.change(version, BY, "card", lambda old: old)
    other = catalog.add_version("acme", "a", content("x"), BY)[0]
    assert descriptions.get(other) == Description()


def test_of_a_deleted_adapter_or_tenant(
    catalog: Catalog, descriptions: Descriptions, tenants: Tenants, database: Database, version: Version
) -> None:
    """The description of a deleted adapter or tenant is NotFound immediately, and its row is removed with the
    others."""
    tenants.delete("acme", BY)
    with pytest.raises(NotFound):
        descriptions.get(version)
    with pytest.raises(NotFound):
        descriptions.change(version, BY, "card", lambda old: old)
    remove_deleted(database)
    assert rows(database) == 0


def test_long_ones_are_removed_a_few_at_a_time(
    catalog: Catalog, database: Database, content: Content, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One transaction removes a bounded number of bytes of descriptions; the versions are removed after the last of
    them."""
    monkeypatch.setattr(deletions, "_TEXT_BYTES", 250)
    for word in ("u", "v", "w", "x", "y"):
        described = Description(word * 100)
        catalog.add_version("acme", "a", content(word), BY, description=described, make_tenant=True)
    catalog.delete("acme", parse_reference("a"), BY)
    left = [rows(database)]
    while Deletions(database).remove_slice():
        left.append(rows(database))
    assert left[:3] == [5, 3, 1]
    assert left[-1] == 0
    with database.reading() as connection:
        assert connection.execute(sa.text("SELECT count(*) FROM versions")).scalar_one() == 0
