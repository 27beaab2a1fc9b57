"""Builds the use cases over a catalog, a blob store and the memory of one process."""

from dataclasses import dataclass

from prefix_service.blobs.port import BlobStore
from prefix_service.catalog.audit import AuditLog
from prefix_service.catalog.catalog import Catalog
from prefix_service.catalog.changes import catalog_id
from prefix_service.catalog.database import Database
from prefix_service.catalog.descriptions import Descriptions
from prefix_service.catalog.feed import ChangeFeed
from prefix_service.catalog.keys import Keyring
from prefix_service.catalog.listings import Listings
from prefix_service.catalog.remembered import RememberedVersions
from prefix_service.catalog.tenants import Tenants
from prefix_service.catalog.usage import UsageStore
from prefix_service.library.adapters import Adapters
from prefix_service.library.encodings import Encodings
from prefix_service.library.following import Following
from prefix_service.library.library import Library
from prefix_service.library.pages import Pages
from prefix_service.library.plan import Limits
from prefix_service.library.publishing import Publisher
from prefix_service.library.residency import Residency
from prefix_service.library.shared_files import SharedFiles
from prefix_service.library.statistics import VersionStatistics
from prefix_service.library.tenancy import Tenancy
from prefix_service.library.timeline import Timelines
from prefix_service.registry.admission import Admission
from prefix_service.registry.registry import AdapterRegistry


@dataclass(frozen=True, slots=True)
class UseCases:
    """The use cases of a service, for callers that are already authorised. Whatever blocks is behind an `async` method.

    `residency` and `publisher` listen to `feed` with their `on_changes`, on the event loop.
    """

    library: Library
    residency: Residency
    publisher: Publisher
    adapters: Adapters
    tenancy: Tenancy
    pages: Pages
    following: Following
    statistics: VersionStatistics
    timelines: Timelines
    feed: ChangeFeed


def compose(
    database: Database,
    keyring: Keyring,
    blobs: BlobStore,
    registry: AdapterRegistry,
    limits: Limits,
    admission: Admission,
    shared_files: SharedFiles | None = None,
) -> UseCases:
    """Returns the use cases. Nothing is written, and no thread is started."""
    catalog, listings, tenants, audit = Catalog(database), Listings(database), Tenants(database), AuditLog(database)
    usage, feed = UsageStore(database), ChangeFeed(database)
    with database.reading() as connection:
        followed = catalog_id(connection)
    encodings = Encodings(catalog, blobs, registry.device, registry.host_memory)
    library = Library(RememberedVersions(catalog, feed), encodings, registry, limits, admission, shared_files)
    return UseCases(
        library=library,
        residency=Residency(library, registry, admission, audit, usage),
        publisher=Publisher(catalog, blobs, encodings, admission, limits.upload_bytes, library.clear_failures),
        adapters=Adapters(catalog, Descriptions(database), listings),
        tenancy=Tenancy(database, tenants, keyring),
        pages=Pages(listings, tenants, keyring, audit, usage, admission),
        following=Following(feed, followed),
        statistics=VersionStatistics(encodings, admission),
        timelines=Timelines(audit, usage, admission),
        feed=feed,
    )
