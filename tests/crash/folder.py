"""A data folder as a service sees it, and all of it that must survive a crash."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import anyio
import structlog
import torch

from prefix_service.blobs.folder import FolderBlobStore
from prefix_service.catalog import threads
from prefix_service.catalog.audit import AuditLog
from prefix_service.catalog.database import Database
from prefix_service.catalog.deletions import Deletions
from prefix_service.catalog.garbage import Garbage
from prefix_service.catalog.keys import Keyring
from prefix_service.catalog.listings import Listings
from prefix_service.catalog.records import Version
from prefix_service.catalog.tenants import Tenants
from prefix_service.data_folder.collector import Collector
from prefix_service.data_folder.opening import blob_folder, bootstrap_file, catalog_file
from prefix_service.library.library import Library
from prefix_service.library.plan import Limits, PrefixRequest
from prefix_service.library.wiring import UseCases, compose
from prefix_service.prefix.references import parse_reference
from prefix_service.registry.registry import AdapterRegistry
from prefix_service.settings import Settings
from tests.admission import generous_admission

_LIMITS = Limits(batch_size=8, sequence_length=64, upload_bytes=1 << 24)


def quiet() -> None:
    """Turns the log off, because its lines are writes, which are counted."""
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())


def settings_of(data_dir: Path) -> Settings:
    """Returns a service's settings for this folder."""
    return Settings(data_dir=data_dir, garbage_grace=3600)


@dataclass(frozen=True)
class Service:
    """The collaborators of a running service."""

    data_dir: Path
    database: Database
    cases: UseCases
    blobs: FolderBlobStore
    keyring: Keyring

    def remove_deleted(self) -> None:
        """Removes the rows of what was deleted."""
        deletions = Deletions(self.database)
        while deletions.remove_slice():
            pass

    def collector(self) -> Collector:
        """Returns a collector without a grace period."""
        return Collector(Garbage(self.database), self.blobs, 0)


@contextmanager
def serving(data_dir: Path) -> Iterator[Service]:
    """Yields the collaborators of a service on an existing folder."""
    database = Database(catalog_file(data_dir))
    blobs = FolderBlobStore(blob_folder(data_dir))
    registry = AdapterRegistry(torch.device("cpu"), 1 << 26, 1 << 26)
    try:
        keyring = Keyring(database, data_dir / "key.secret")
        cases = compose(database, keyring, blobs, registry, _LIMITS, generous_admission())
        # A read that a slow machine holds up for two seconds would be refused, and a change fail without a failed call.
        with patch.object(threads, "DEADLINE", 60.0):
            yield Service(data_dir, database, cases, blobs, keyring)
    finally:
        database.close()


Snapshot = dict[str, Any]


def snapshot(service: Service) -> Snapshot:
    """Returns all that a caller can see, read through the service: every version with the bytes of its weights and of
    its prefix, `latest`, aliases, tenants, the audit, and whether the first key works.
    """
    return anyio.run(_snapshot, service)


async def _snapshot(service: Service) -> Snapshot:
    library, listings = service.cases.library, Listings(service.database)
    found: Snapshot = {"admin": _first_key_works(service)}
    for tenant in Tenants(service.database).listed("", 1000):
        found[tenant.name] = (tenant.adapters, tenant.bytes)
        for adapter in listings.adapters(tenant.name, after=None, limit=1000):
            name = adapter.latest.adapter
            latest = await library.resolve(tenant.name, parse_reference(name))
            found[f"{tenant.name}/{name}"] = (latest.number, adapter.aliases)
            for version in listings.versions(tenant.name, name, before=None, limit=1000):
                found[f"{tenant.name}/{name}@{version.number}"] = await _whole(library, version)
    entries = AuditLog(service.database).listed(None, before=None, limit=1000)
    found["audit"] = [(entry.action, entry.tenant, entry.target, entry.details) for entry in entries if entry.tenant]
    return found


async def _whole(library: Library, version: Version) -> tuple[str, str, str]:
    """Returns a version's digest, and the hashes of its weights and of its prefix as they are served."""
    manifest = f"sha256:{hashlib.sha256(version.manifest.encode()).hexdigest()}"
    if manifest != version.digest:
        raise AssertionError(f"{version.digest} is the digest of another manifest")
    with await library.open_weights(version) as file:
        weights = hashlib.sha256(file.read()).hexdigest()
    plan = library.plan(version, PrefixRequest())
    async with library.rendering(plan) as rendering:
        body = b"".join(plan.file.chunks(rendering))
    return version.digest, weights, hashlib.sha256(body).hexdigest()


def _first_key_works(service: Service) -> bool:
    principal = service.keyring.verify(bootstrap_file(service.data_dir).read_text().strip())
    return principal.tenant is None and principal.scope == "admin"


def leftovers(service: Service) -> list[str]:
    """Returns the files that the blob folder lacks or has too much, by the catalog; none after a collection."""
    root = blob_folder(service.data_dir)
    there = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()} - {"lock"}
    digests = {digest for _, *pair in Garbage(service.database).named() for digest in pair}
    named = {str(service.blobs.path(digest).relative_to(root)) for digest in digests}
    return sorted(there ^ named)
