"""After it has read the change feed, a process remembers of the catalog what another process made of it."""

import asyncio
import contextlib
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeVar

import pytest
import sqlalchemy as sa
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from limits import RateLimitItemPerSecond

from prefix_service.api.middleware.rates import RateLimits
from prefix_service.blobs.folder import FolderBlobStore
from prefix_service.catalog.database import Database
from prefix_service.catalog.deletions import Deletions
from prefix_service.catalog.descriptions import Descriptions
from prefix_service.catalog.keys import Keyring
from prefix_service.catalog.records import NewVersion, Quotas, Version
from prefix_service.catalog.schema import changes
from prefix_service.catalog.tenants import Tenants
from prefix_service.errors import Conflict, NotFound, PrefixServiceError, Unauthenticated
from prefix_service.library import unknown_ids
from prefix_service.library.known_keys import KnownKeys
from prefix_service.library.plan import Limits
from prefix_service.library.unknown_ids import UnknownIds
from prefix_service.library.wiring import UseCases, compose
from prefix_service.prefix.description import Description
from prefix_service.prefix.kv import PrefixKV
from prefix_service.prefix.references import parse_reference
from prefix_service.registry.keys import VersionKey
from prefix_service.registry.registry import AdapterRegistry
from tests.admission import generous_admission
from tests.api.helpers import CONFIG
from tests.catalog.conftest import BY, HoldingCatalog

T = TypeVar("T")
TENANTS = ("acme", "beta")
REFERENCES = ("a", "a@1", "a@2", "a@3", "a@prod", "b", "b@1", "b@prod")
MOST_KEYS = 8
NBYTES = 16
MANIFEST = f'{{"config":{json.dumps(CONFIG)}}}'

tenants, adapters = st.sampled_from(TENANTS), st.sampled_from("aaab")
numbers = st.sampled_from([1, 2, 2, 3])


class Follower:
    """A process that has the catalog open, with everything that it remembers of it."""

    def __init__(self, folder: Path, loop: asyncio.Runner) -> None:
        self._loop = loop
        self.database = Database(folder / "catalog.sqlite")
        self.registry = AdapterRegistry(torch.device("cpu"), 1 << 20, 1 << 20)
        blobs = FolderBlobStore(folder / "blobs")
        limits = Limits(batch_size=8, sequence_length=64, upload_bytes=1 << 20)
        keyring = Keyring(self.database, folder / "key.secret")
        cases = loop.run(self._made(keyring, blobs, limits))
        self.library, self.feed = cases.library, cases.feed
        self.keys = KnownKeys(keyring, UnknownIds(), lambda: self.feed.are_known)
        self.rates = RateLimits(cases.tenancy.requests_per_second, lambda: self.feed.are_known)
        for listening in (cases.residency, self.keys, self.rates):
            self.feed.listen(listening.on_changes)

    async def _made(self, keyring: Keyring, blobs: FolderBlobStore, limits: Limits) -> UseCases:
        return compose(self.database, keyring, blobs, self.registry, limits, generous_admission())

    def read_on(self) -> None:
        """Reads the feed, on the event loop of the caches."""

        async def read() -> None:
            self.feed.catch_up()

        self._loop.run(read())

    def close(self) -> None:
        self.keys._threads.shutdown()
        self.database.close()

    def resolve(self, tenant: str, reference: str) -> Version | None:
        return _or_none(NotFound, lambda: self._loop.run(self.library.resolve(tenant, parse_reference(reference))))

    def load(self, version: Version) -> None:
        """Loads tensors of a version into memory."""

        async def load() -> None:
            key = VersionKey(version.tenant, version.adapter, version.number, version.digest, version.key_values)
            await self.registry.prefix(key, NBYTES, lambda: PrefixKV.whole(torch.zeros(1, 2, 1, 1, 2)))

        self._loop.run(load())

    def resident(self) -> set[VersionKey]:
        return {key for key, _ in self.registry._prefixes.residency.items()}

    def owner_of(self, text: str) -> tuple[str, str | None, int | None] | None:
        async def verify() -> tuple[str, str | None, int | None]:
            header = f"Bearer {text}".encode()
            found = self.keys.recall(header) or await self.keys.verify(header, text)
            return found.key_id, found.tenant, found.tenant_id

        return _or_none(Unauthenticated, lambda: self._loop.run(verify()))

    def rate_of(self, tenant: str) -> int | None:
        rate = self._loop.run(self.rates._rate(tenant))
        return None if rate is None else rate.amount


def _or_none(error: type[PrefixServiceError], ask: Callable[[], T]) -> T | None:
    try:
        return ask()
    except error:
        return None


class Following(RuleBasedStateMachine):
    """One process changes the catalog. Another remembers everything that is there, and reads the feed after each
    change, or after several."""

    def __init__(self, template: Path) -> None:
        super().__init__()
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        shutil.copy(template, folder / "catalog.sqlite")
        self._writer = Database(folder / "catalog.sqlite")
        self._catalog, self._tenants = HoldingCatalog(self._writer), Tenants(self._writer)
        self._keyring = Keyring(self._writer, folder / "key.secret")
        self._texts: list[str] = []
        self._loop = asyncio.Runner()
        self._follower = Follower(folder, self._loop)
        self._missed = 0

    @initialize()
    def begin(self) -> None:
        """Makes two tenants with two versions of an adapter, an alias and a key each; one has a rate."""
        for tenant in TENANTS:
            for word in "xy":
                self.publish(tenant, "a", word)
            self.move(tenant, "a", 1)
            self.make_key(tenant)
        self.limit("acme", 1)

    def teardown(self) -> None:
        self._follower.close()
        self._loop.close()
        self._writer.close()
        self._folder.cleanup()

    @rule(tenant=tenants, adapter=adapters, word=st.sampled_from("xyz"))
    def publish(self, tenant: str, adapter: str, word: str) -> None:
        """Publishes a version; it may make its tenant, and its content may be known."""
        digest = f"sha256:{hashlib.sha256(word.encode()).hexdigest()}"
        new = NewVersion(digest, MANIFEST, None, digest, 10, "float32", digest, NBYTES)
        self._catalog.add_version(tenant, adapter, new, BY, make_tenant=True)

    @rule(tenant=tenants, adapter=adapters, number=numbers)
    def encode_again(self, tenant: str, adapter: str, number: int) -> None:
        """Gives a version other tensors."""
        with contextlib.suppress(NotFound):
            version = self._catalog.resolve(tenant, parse_reference(f"{adapter}@{number}"))
            self._catalog.replace_key_values(version, f"{version.key_values}x")

    @rule(tenant=tenants, adapter=adapters, number=numbers, card=st.sampled_from(["", "x"]))
    def describe(self, tenant: str, adapter: str, number: int, card: str) -> None:
        """Changes a description, on which nothing remembered depends."""
        with contextlib.suppress(NotFound):
            version = self._catalog.resolve(tenant, parse_reference(f"{adapter}@{number}"))
            Descriptions(self._writer).change(version, BY, "card", lambda _: Description(card, {}))

    @rule(tenant=tenants, adapter=adapters, number=numbers)
    def move(self, tenant: str, adapter: str, number: int) -> None:
        """Moves an alias, which may be new."""
        with contextlib.suppress(NotFound):
            self._catalog.put_alias(tenant, adapter, "prod", number, BY)

    @rule(tenant=tenants, adapter=adapters)
    def delete_alias(self, tenant: str, adapter: str) -> None:
        with contextlib.suppress(NotFound):
            self._catalog.delete_alias(tenant, adapter, "prod", BY)

    @rule(tenant=tenants, adapter=adapters, number=st.none() | numbers)
    def delete(self, tenant: str, adapter: str, number: int | None) -> None:
        """Deletes a version, perhaps the last one, or an adapter."""
        reference = adapter if number is None else f"{adapter}@{number}"
        with contextlib.suppress(NotFound, Conflict):
            self._catalog.delete(tenant, parse_reference(reference), BY)

    @rule(tenant=tenants)
    def delete_tenant(self, tenant: str) -> None:
        with contextlib.suppress(NotFound):
            self._tenants.delete(tenant, BY)

    @rule(tenant=tenants, rate=st.sampled_from([None, 1, 2]))
    def limit(self, tenant: str, rate: int | None) -> None:
        """Gives a tenant, which may be new, a rate."""
        self._tenants.put(tenant, BY, Quotas(requests_per_second=rate))

    @rule(tenant=st.none() | tenants)
    def make_key(self, tenant: str | None) -> None:
        if len(self._texts) < MOST_KEYS:
            with contextlib.suppress(NotFound):
                self._texts.append(self._keyring.create(tenant, "read", "", BY)[1])

    @rule(index=st.integers(0, MOST_KEYS - 1), days=st.integers(1, 9))
    def shorten_key(self, index: int, days: int) -> None:
        with contextlib.suppress(NotFound, Conflict):
            for key, tenant in self._some_key(index):
                self._keyring.shorten(tenant, key, datetime.now(UTC) + timedelta(days=days), BY)

    @rule(index=st.integers(0, MOST_KEYS - 1))
    def revoke(self, index: int) -> None:
        with contextlib.suppress(NotFound):
            for key, tenant in self._some_key(index):
                self._keyring.revoke(tenant, key, BY)

    def _some_key(self, index: int) -> list[tuple[str, str | None]]:
        """Returns one of the keys that were made, and its owner; None if there are too few."""
        for text in self._texts[index : index + 1]:
            with contextlib.suppress(Unauthenticated):
                principal = self._keyring.verify(text)
                return [(principal.key_id, principal.tenant)]
        return []

    @rule()
    def remove_deleted(self) -> None:
        """Removes deleted rows, as the collector does."""
        Deletions(self._writer).remove_slice()

    @rule(kept=st.integers(0, 2))
    def remove_changes(self, kept: int) -> None:
        """Removes all but the latest changes, as the collector does, whoever has read them."""
        with self._writer.writing() as connection:
            latest = sa.select(changes.c.revision).order_by(changes.c.revision.desc()).limit(kept)
            connection.execute(sa.delete(changes).where(changes.c.revision.not_in(latest)))

    @rule(changes=st.integers(1, 4))
    def fall_behind(self, changes: int) -> None:
        """Does not read the feed for a number of changes."""
        self._missed = changes

    @invariant()
    def follow(self) -> None:
        """Reads the feed, and checks that everything is remembered again and nothing remembered is untrue."""
        if self._missed:
            self._missed -= 1
            return
        self._read_on()
        self._ask()

    def _ask(self) -> None:
        for tenant in TENANTS:
            self._follower.rate_of(tenant)
            for reference in REFERENCES:
                if (version := self._follower.resolve(tenant, reference)) is not None:
                    self._follower.load(version)
        for text in self._texts:
            self._follower.owner_of(text)

    def _read_on(self) -> None:
        self._follower.read_on()
        for tenant in TENANTS:
            assert self._follower.rate_of(tenant) == self._tenants.requests_per_second(tenant)
            for reference in REFERENCES:
                expected = self._expected(tenant, reference)
                assert self._follower.resolve(tenant, reference) == expected, f"{tenant}/{reference}"
        for text in self._texts:
            assert self._follower.owner_of(text) == self._owner_of(text)
        for key in self._follower.resident():
            version = self._expected(key.tenant, f"{key.adapter}@{key.version}")
            assert version is not None, key
            assert (version.digest, version.key_values) == (key.digest, key.key_values)

    def _expected(self, tenant: str, reference: str) -> Version | None:
        return _or_none(NotFound, lambda: self._catalog.resolve(tenant, parse_reference(reference)))

    def _owner_of(self, text: str) -> tuple[str, str | None, int | None] | None:
        found = _or_none(Unauthenticated, lambda: self._keyring.verify(text))
        return None if found is None else (found.key_id, found.tenant, found.tenant_id)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a catalog whose audit lines are made meaningless as they are written."""
    place = tmp_path_factory.mktemp("template") / "catalog.sqlite"
    database = Database(place)
    with database.writing() as connection:
        connection.exec_driver_sql(
            "CREATE TRIGGER reworded AFTER INSERT ON audit BEGIN UPDATE audit SET tenant_id = NULL, tenant = NULL, "
            "action = 'something was done', target = 'to something', details = '{}' WHERE id = NEW.id; END"
        )
    database.close()
    return place


def test_what_is_remembered_follows_the_catalog(template: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Remembered versions, aliases, tensors, keys and rates follow any changes in any order, whatever the words of the
    audit are."""
    monkeypatch.setattr(unknown_ids, "_MOST", RateLimitItemPerSecond(10_000))
    run_state_machine_as_test(
        lambda: Following(template),  # type: ignore[arg-type]  # it is only called
        settings=settings(max_examples=10, stateful_step_count=25, deadline=None),
    )
