"""Fixtures of a catalog on a new database: each test runs on SQLite and on PostgreSQL."""

import hashlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from prefix_service.catalog.audit import AuditLog
from prefix_service.catalog.catalog import Catalog
from prefix_service.catalog.database import Database
from prefix_service.catalog.deletions import Deletions
from prefix_service.catalog.descriptions import Descriptions
from prefix_service.catalog.garbage import Garbage
from prefix_service.catalog.keys import Keyring
from prefix_service.catalog.listings import Listings
from prefix_service.catalog.records import NewVersion, Principal, Version
from prefix_service.catalog.tenants import Tenants
from prefix_service.prefix.description import EMPTY, Description
from tests.postgresql import PostgreSQL

Content = Callable[..., NewVersion]
Place = Path | str
"""Where a database is: a file for SQLite, a URL for PostgreSQL."""

BY = Principal("platform-key", None, "admin", has_key=False)
"""Who makes the changes that a test is not about."""


class HoldingCatalog(Catalog):
    """Holds the blobs of a version before it is added, as publishing does."""

    def add_version(
        self,
        tenant: str,
        adapter: str,
        new: NewVersion,
        by: Principal,
        *,
        description: Description = EMPTY,
        make_tenant: bool = False,
    ) -> tuple[Version, bool]:
        self.hold((new.weights, new.key_values))
        return super().add_version(tenant, adapter, new, by, description=description, make_tenant=make_tenant)

    def replace_key_values(self, version: Version, digest: str) -> Version:
        self.hold((digest,))
        return super().replace_key_values(version, digest)


# Tests of what one of the two alone does.
on_sqlite = pytest.mark.parametrize("place", ["sqlite"], indirect=True)
on_postgresql = pytest.mark.parametrize("place", ["postgresql"], indirect=True)


@pytest.fixture(scope="session")
def template(postgresql: PostgreSQL) -> str:
    """A PostgreSQL database that was migrated once, to be copied."""
    name = postgresql.new_database()
    Database(postgresql.url(name)).close()
    return name


@pytest.fixture(params=["sqlite", "postgresql"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    if request.param == "sqlite":
        yield tmp_path / "catalog.sqlite"
        return
    server: PostgreSQL = request.getfixturevalue("postgresql")
    name = server.new_database(request.getfixturevalue("template"))
    yield server.url(name)
    server.drop(name)


@pytest.fixture(scope="session")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SQLite database that was migrated once, to be copied."""
    path = tmp_path_factory.mktemp("migrated") / "catalog.sqlite"
    Database(path).close()
    return path


@pytest.fixture
def database(place: Place, copied: Path) -> Iterator[Database]:
    if isinstance(place, Path):
        shutil.copyfile(copied, place)
    opened = Database(place)
    yield opened
    opened.close()


@pytest.fixture
def catalog(database: Database) -> Catalog:
    return HoldingCatalog(database)


@pytest.fixture
def listings(database: Database) -> Listings:
    return Listings(database)


@pytest.fixture
def descriptions(database: Database) -> Descriptions:
    return Descriptions(database)


@pytest.fixture
def tenants(database: Database) -> Tenants:
    return Tenants(database)


@pytest.fixture
def audit(database: Database) -> AuditLog:
    return AuditLog(database)


@pytest.fixture
def garbage(database: Database) -> Garbage:
    return Garbage(database)


def remove_deleted(database: Database) -> None:
    """Removes every row of everything that was deleted, as the collector does."""
    deletions = Deletions(database)
    while deletions.remove_slice():
        pass


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    return tmp_path / "secrets" / "key.secret"


@pytest.fixture
def keyring(database: Database, secret: Path) -> Keyring:
    return Keyring(database, secret)


@pytest.fixture
def content() -> Content:
    """Returns a function that makes the record of a version for a word, as publishing does: 10 bytes of weights, 20 of
    keys and values, and 70 of the manifest."""

    def make(word: str, base_model: str | None = "gpt2") -> NewVersion:
        digest = f"sha256:{hashlib.sha256(word.encode()).hexdigest()}"
        manifest = f'{{"config":{{"word":"{word}"}}}}'.ljust(70)
        return NewVersion(digest, manifest, base_model, digest, 10, "bfloat16", digest, 20)

    return make
