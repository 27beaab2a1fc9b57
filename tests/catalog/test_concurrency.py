"""Threads that do everything in parallel on few names: each call ends with a result or a documented refusal."""

import contextlib
import random
import time
from concurrent.futures import ThreadPoolExecutor

import sqlalchemy as sa

from prefix_service.catalog.audit import AuditLog
from prefix_service.catalog.database import Database
from prefix_service.catalog.deletions import Deletions
from prefix_service.catalog.garbage import Garbage
from prefix_service.catalog.keys import Keyring
from prefix_service.catalog.records import Quotas
from prefix_service.catalog.schema import adapters, aliases, tenants, versions
from prefix_service.catalog.tenants import Tenants
from prefix_service.errors import Conflict, NotFound, PreconditionFailed, QuotaExceeded, Unauthenticated, Unavailable
from prefix_service.prefix.references import parse_reference
from tests.catalog.conftest import BY, Content, HoldingCatalog, on_postgresql, remove_deleted

SECONDS = 3.0
REFUSALS = (Conflict, NotFound, PreconditionFailed, QuotaExceeded, Unauthenticated, Unavailable)
"""What may come of others' changes; a collector without a grace period takes what a publisher has just held. A
deadlock, or a row that vanished under a foreign key, is a StorageFailed."""


class Worker:
    """Makes random calls on three tenants of two adapters, whose versions share their blobs."""

    def __init__(self, database: Database, keyring: Keyring, content: Content, seed: int) -> None:
        self._catalog, self._tenants, self._garbage = HoldingCatalog(database), Tenants(database), Garbage(database)
        self._deletions = Deletions(database)
        self._audit, self._keyring, self._content = AuditLog(database), keyring, content
        self._choose = random.Random(seed)  # noqa: S311
        self._keys = [("acme", "", "")]
        self.calls = 0

    def run(self) -> int:
        """Makes calls one after another, and returns how many there were."""
        deadline = time.monotonic() + SECONDS
        calls = [self.publish, self.move, self.delete, self.delete_tenant, self.put, self.make_key, self.use_key]
        calls += [self.revoke_key, self.note, self.collect, self.publish, self.move]
        while time.monotonic() < deadline:
            with contextlib.suppress(*REFUSALS):
                self._choose.choice(calls)()
            self.calls += 1
        return self.calls

    def _tenant(self) -> str:
        return self._choose.choice(["acme", "beta", "gamma"])

    def _adapter(self) -> str:
        return self._choose.choice("ab")

    def publish(self) -> None:
        new = self._content(self._choose.choice("stuvwxyz"))
        self._catalog.add_version(self._tenant(), self._adapter(), new, BY, make_tenant=True)

    def move(self) -> None:
        tenant, adapter = self._tenant(), self._adapter()
        number = self._catalog.resolve(tenant, parse_reference(adapter)).number
        self._catalog.put_alias(tenant, adapter, "prod", number, BY)

    def delete(self) -> None:
        tenant, adapter = self._tenant(), self._adapter()
        number = self._catalog.resolve(tenant, parse_reference(adapter)).number
        reference = self._choose.choice([adapter, f"{adapter}@{number}"])
        self._catalog.delete(tenant, parse_reference(reference), BY)

    def delete_tenant(self) -> None:
        self._tenants.delete(self._tenant(), BY)

    def put(self) -> None:
        self._tenants.put(self._tenant(), BY, Quotas(max_bytes=self._choose.choice([None, 100])))

    def make_key(self) -> None:
        tenant = self._tenant()
        key, text = self._keyring.create(tenant, "read", "", BY)
        self._keys.append((tenant, key.id, text))

    def use_key(self) -> None:
        self._keyring.verify(self._choose.choice(self._keys)[2])

    def revoke_key(self) -> None:
        tenant, key_id, _ = self._choose.choice(self._keys)
        self._keyring.revoke(tenant, key_id, BY)

    def note(self) -> None:
        self._audit.add(BY, "looked.at", self._tenant(), "x")

    def collect(self) -> None:
        self._garbage.wanted([self._content(word).digest for word in "stuvwxyz"], 0)
        self._garbage.forget(self._garbage.expired(0))
        self._deletions.remove_slice()


def test_everything_at_once(database: Database, keyring: Keyring, content: Content) -> None:
    """The threads meet nothing but refusals; afterwards every alias has its version, and every adapter a version."""
    workers = [Worker(database, keyring, content, seed) for seed in range(8)]
    with ThreadPoolExecutor(len(workers)) as pool:
        counts = [future.result(60) for future in [pool.submit(worker.run) for worker in workers]]
    assert min(counts) > 0
    remove_deleted(database)
    named = sa.select(versions.c.adapter_id, versions.c.number)
    pointed = sa.select(aliases.c.adapter_id, aliases.c.number)
    empty = sa.select(adapters.c.id).where(adapters.c.id.not_in(sa.select(versions.c.adapter_id)))
    with database.reading() as connection:
        assert {tuple(row) for row in connection.execute(pointed)} <= {tuple(row) for row in connection.execute(named)}
        assert connection.execute(empty).all() == []


def fill(database: Database, tenant: str, blobs: list[int]) -> None:
    """Makes a tenant with a version for each of these blobs."""
    Tenants(database).put(tenant, BY)
    with database.writing() as connection:
        owner = connection.scalar(sa.select(tenants.c.id).where(tenants.c.name == tenant))
        new = sa.insert(adapters).values(tenant_id=owner, name="a", versions=len(blobs)).returning(adapters.c.id)
        adapter_id = connection.scalar(new)
        for number, blob in enumerate(blobs, 1):
            row = {"adapter_id": adapter_id, "number": number, "digest": str(number), "manifest": "{}"}
            row |= {"weights": f"w{blob}", "weights_bytes": 1, "weights_dtype": "bfloat16"}
            connection.execute(sa.insert(versions).values(key_values=f"w{blob}", key_values_bytes=1, **row))


@on_postgresql
def test_tenants_that_share_blobs_go_at_once(database: Database) -> None:
    """Tenants with the same blobs are deleted in parallel without a deadlock, since each locks the rows of garbage in
    the same order."""
    names = [f"t{n}" for n in range(8)]
    for n, name in enumerate(names):
        fill(database, name, random.Random(n).sample(range(400), 400 - 40 * n))  # noqa: S311
    with ThreadPoolExecutor(len(names)) as pool:
        list(pool.map(lambda name: Tenants(database).delete(name, BY), names))
        list(pool.map(lambda _: remove_deleted(database), names))
