"""A fleet that the tests of a module share."""

from collections.abc import Iterator

import pytest

from tests.fleet.starting import Engines, Fleet, running_fleet
from tests.postgresql import PostgreSQL
from tests.seaweedfs import SeaweedFS


@pytest.fixture(scope="module")
def engines(postgresql: PostgreSQL, seaweedfs: SeaweedFS) -> Iterator[Engines]:
    """Yields an empty database and an empty path in a bucket."""
    made = Engines.new(postgresql, seaweedfs)
    yield made
    postgresql.drop(made.database)


@pytest.fixture(scope="module")
def whole_fleet(engines: Engines, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Yields three replicas behind HAProxy."""
    with running_fleet(engines, tmp_path_factory.mktemp("fleet")) as fleet:
        yield fleet
