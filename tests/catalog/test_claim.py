"""`catalog.claim`: whose a catalog is, noted once, with its first key."""

from collections.abc import Callable

import pytest
import sqlalchemy as sa

from prefix_service.catalog.claim import Claim, claim, require_claim
from prefix_service.catalog.database import Database
from prefix_service.catalog.keys import Keyring
from prefix_service.errors import Conflict, NotFound
from tests.catalog.conftest import BY


@pytest.fixture
def made() -> list[str]:
    """The texts of first keys."""
    return []


@pytest.fixture
def make(keyring: Keyring, made: list[str]) -> Callable[[sa.Connection], object]:
    return lambda connection: made.append(keyring.create_first(connection))


def test_the_first_start_makes_the_first_key(
    database: Database, keyring: Keyring, make: Callable[[sa.Connection], object], made: list[str]
) -> None:
    """It is a platform admin's; later starts compare, and make none."""
    mine = Claim(keyring.fingerprint, "folder 1")
    with pytest.raises(NotFound, match="no service has run on this catalog yet"):
        require_claim(database, keyring)
    for _ in range(2):
        claim(database, mine, make)
    (text,) = made
    principal = keyring.verify(text)
    assert (principal.tenant, principal.scope) == (None, "admin")
    require_claim(database, keyring, "folder 1")
    keyring.revoke(None, principal.key_id, BY)
    claim(database, mine, make)
    assert keyring.listed(None) == []


@pytest.mark.parametrize(
    ("other", "said"), [("secret", "hashed with another secret"), ("blobs", "belongs to the blob store 'folder 1'")]
)
def test_another_secret_or_blob_store_is_refused(database: Database, keyring: Keyring, other: str, said: str) -> None:
    """At the start of a service, and where nothing may be changed."""
    claim(database, Claim(keyring.fingerprint if other == "blobs" else "0" * 32, "folder 1"), None)
    with pytest.raises(Conflict, match=said):
        claim(database, Claim(keyring.fingerprint, "folder 2"), None)
    with pytest.raises(Conflict, match=said):
        require_claim(database, keyring, "folder 2")


def test_a_catalog_with_keys_gets_no_first_one(
    database: Database, keyring: Keyring, make: Callable[[sa.Connection], object], made: list[str]
) -> None:
    """As one that came from a data folder."""
    keyring.create(None, "admin", "", BY)
    claim(database, Claim(keyring.fingerprint, "folder 1"), make)
    assert made == []


def test_a_first_start_that_fails_notes_nothing(database: Database, keyring: Keyring) -> None:
    """The next one is the first again."""

    def fail(_connection: sa.Connection) -> None:
        raise KeyError

    with pytest.raises(KeyError):
        claim(database, Claim(keyring.fingerprint, "folder 1"), fail)
    with pytest.raises(NotFound):
        require_claim(database, keyring)
