"""A catalog on a new SQLite file."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from service.catalog.catalog import Catalog
from service.catalog.database import Database
from service.catalog.records import NewVersion

Content = Callable[..., NewVersion]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "catalog.sqlite"


@pytest.fixture
def database(path: Path) -> Iterator[Database]:
    opened = Database(path)
    yield opened
    opened.close()


@pytest.fixture
def catalog(database: Database) -> Catalog:
    return Catalog(database)


@pytest.fixture
def content() -> Content:
    """What publishing would put into the catalog, for a content that is told apart by a word."""

    def make(word: str, base_model: str | None = "gpt2") -> NewVersion:
        digest = f"sha256:{hashlib.sha256(word.encode()).hexdigest()}"
        manifest = f'{{"config":{{"word":"{word}"}}}}'
        return NewVersion(digest, manifest, base_model, digest, 10, "bfloat16", digest, 20)

    return make
