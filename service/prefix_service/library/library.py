"""The use cases: resolve, fetch, delete, load. The only place where the rooms meet; no HTTP here."""

import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial

from anyio import to_thread

from prefix_service.blobs.folder import BlobStore
from prefix_service.catalog.audit import AuditLog
from prefix_service.catalog.authority import prove
from prefix_service.catalog.catalog import Catalog
from prefix_service.catalog.changes import (
    AdapterDeleted,
    Change,
    EverythingChanged,
    TenantDeleted,
    VersionDeleted,
    VersionEncoded,
    catalog_id,
)
from prefix_service.catalog.database import Database
from prefix_service.catalog.descriptions import Descriptions
from prefix_service.catalog.feed import ChangeFeed
from prefix_service.catalog.listings import Listings
from prefix_service.catalog.reads import read_catalog
from prefix_service.catalog.records import Principal, Version, VersionName
from prefix_service.catalog.remembered import RememberedVersions
from prefix_service.catalog.tenants import Tenants
from prefix_service.errors import InvalidRequest, NotFound
from prefix_service.library.digests import BodyDigests
from prefix_service.library.encodings import EncodedAgain, Encodings, unstable
from prefix_service.library.plan import (
    Limits,
    MixedPlan,
    MixedRequest,
    MixedVersions,
    Plan,
    PrefixRequest,
    make_mixed_plan,
    make_plan,
)
from prefix_service.library.publishing import Publisher
from prefix_service.library.shared_files import SharedFiles
from prefix_service.prefix.kv import PrefixKV
from prefix_service.prefix.references import Reference
from prefix_service.prefix.wire.digests import Algorithm
from prefix_service.prefix.wire.extras import InputMask
from prefix_service.prefix.wire.rendering import Rendering
from prefix_service.registry.admission import Admission
from prefix_service.registry.keys import RenderingKey, VersionKey
from prefix_service.registry.registry import AdapterRegistry
from prefix_service.registry.tier import Lease, Leases

log = logging.getLogger("prefix_service")

OnLoad = Callable[[Version], object]
"""Is called with a version whose tensors are being loaded."""


class Library:
    """What the service does, for callers that have been authorised already."""

    def __init__(
        self,
        database: Database,
        blobs: BlobStore,
        registry: AdapterRegistry,
        limits: Limits,
        admission: Admission,
        shared_files: SharedFiles | None = None,
    ) -> None:
        self._database = database
        self.catalog = Catalog(database)
        self.descriptions = Descriptions(database)
        self.listings = Listings(database)
        self.feed = ChangeFeed(database)
        with database.reading() as connection:
            self.catalog_id = catalog_id(connection)
        self._versions = RememberedVersions(self.catalog, self.feed)
        self.tenants = Tenants(database)
        self.audit = AuditLog(database)
        self.limits = limits
        self.admission = admission
        self.registry = registry
        self.encodings = Encodings(self.catalog, blobs, registry.device, registry.host_memory)
        self.publisher = Publisher(
            self.catalog,
            blobs,
            self.encodings,
            admission,
            limits.upload_bytes,
            mended=lambda version: registry.forgive(_key(version)),
        )
        self._digests = BodyDigests(admission)
        self._shared_files = shared_files

    async def resolve(self, tenant: str, reference: Reference) -> Version:
        """The version that a reference means now.

        Raises:
            NotFound: there is none.
        """
        known = self._versions.get(tenant, reference)
        return await read_catalog(self._resolve, tenant, reference) if known is None else known

    def _resolve(self, tenant: str, reference: Reference) -> Version:
        version = self._versions.resolve(tenant, reference)
        _ = version.prefix_config  # parsed here, where no event loop waits for it
        return version

    async def resolve_for(self, by: Principal, tenant: str, reference: Reference) -> Version:
        """The same for a caller who may not see every tenant.

        Raises:
            NotFound: there is none, or it is another tenant's; in the same words.
        """
        if not by.may_see(tenant):
            raise NotFound(f"there is no {tenant}/{reference}")
        return await self.resolve(tenant, reference)

    def is_current(self, version: Version, reference: Reference) -> bool:
        """Whether a reference is known to mean this version still, without a look into the catalog."""
        return self._versions.get(version.tenant, reference) is version

    def plan(self, version: Version, request: PrefixRequest, mask: InputMask | None = None) -> Plan:
        """Everything of an answer but its tensors.

        Raises:
            InvalidRequest: an option is out of bounds, or contradicts the mask.
        """
        return make_plan(version, request, mask, self.limits)

    def plan_mixed(self, rows: MixedVersions, request: MixedRequest, mask: InputMask | None) -> MixedPlan:
        """Everything of an answer for many adapters but its tensors.

        Raises:
            InvalidRequest: rows do not agree, or an option is out of bounds or contradicts rows or mask.
        """
        return make_mixed_plan(rows, request, mask, self.limits)

    @contextlib.asynccontextmanager
    async def renderings(self, plan: MixedPlan, on_load: OnLoad | None = None) -> AsyncIterator[list[list[Rendering]]]:
        """The renderings of every prefix in a plan's rows, together in host memory while the block runs; one of each
        version. Nothing else of such an answer depends on the stored bits, so versions that are encoded again meanwhile
        change no plan.

        The block raises:
            OutOfSpace: they do not fit the memory budget together.
            CorruptBlob, StorageFailed, Unavailable: as for one.
        """
        plans = {planned.etag: planned for row in plan.rows for planned in row}
        async with contextlib.AsyncExitStack() as stack:
            found = await self._entered(stack, list(plans.values()), on_load)
            known = dict(zip(plans, found, strict=True))
            yield [[known[planned.etag] for planned in row] for row in plan.rows]

    async def _entered(
        self, stack: contextlib.AsyncExitStack, plans: list[Plan], on_load: OnLoad | None
    ) -> list[Rendering]:
        """Begin a lease of each plan, or of the plan that replaces it."""
        renewed: set[Version] = set()
        while True:
            try:
                return await stack.enter_async_context(Leases([self.rendering(plan, None, on_load) for plan in plans]))
            except EncodedAgain as again:
                if again.version in renewed:
                    raise unstable(again) from again
                renewed.add(again.version)
                key = _key(again.version).whole
                plans = [plan.renewed(again.version) if _key(plan.version).whole == key else plan for plan in plans]

    @contextlib.asynccontextmanager
    async def current_rendering(self, plan: Plan, on_load: OnLoad | None = None) -> AsyncIterator[Rendering]:
        """The tensors of an answer whose head does not depend on the stored bits: those of the plan, or of a version
        that was encoded again meanwhile.

        The block raises:
            CorruptBlob, StorageFailed, OutOfSpace, Unavailable: as `rendering`.
        """
        async with contextlib.AsyncExitStack() as stack:
            (rendering,) = await self._entered(stack, [plan], on_load)
            yield rendering

    def rendering(
        self, plan: Plan, digest: Algorithm | None = None, on_load: OnLoad | None = None
    ) -> Lease[RenderingKey, Rendering, VersionKey]:
        """The tensors of a plan, in host memory while the block runs. `digest` names the algorithm that the caller will
        pass to `body_digest`, if any: it can be computed while the tensors are read.

        If they are in no memory, `on_load` is called, in a thread, for the one caller for whom they are loaded.

        The block raises:
            EncodedAgain: the stored tensors were lost, and others replaced them: plan again (`Plan.renewed`).
            CorruptBlob, StorageFailed: the stored tensors cannot be read.
            OutOfSpace, Unavailable: the memory budget does not allow it now.
        """
        version, form = plan.version, plan.message.form
        key = RenderingKey(_key(version), form.dtype, form.layers, form.kv_heads)
        load = partial(self._load, version, plan, digest, on_load)
        place = None if self._shared_files is None else partial(self._shared_files.place, plan.message)
        return self.registry.rendering(key, plan.message.rendering_nbytes, version.key_values_bytes, load, place)

    async def body_digest(self, plan: Plan, rendering: Rendering, algorithm: Algorithm) -> bytes | None:
        """Returns the digest of the whole body (RFC 9530), computed once for each entity tag and algorithm; None for
        the SHA-256 of a long body that repeats rows."""
        return await self._digests.of(plan, rendering, algorithm)

    def known_digest(self, plan: Plan, algorithm: Algorithm) -> bytes | None:
        """Returns the digest of the whole body if it was computed before."""
        return self._digests.known(plan, algorithm)

    def _load(self, version: Version, plan: Plan, digest: Algorithm | None, on_load: OnLoad | None) -> PrefixKV:
        if on_load is not None:
            on_load(version)
        return self.encodings.load(version, self._digests.observing(plan, digest))

    async def load(self, version: Version) -> Version:
        """Bring a version into memory now, and wait; return it, with other keys and values if it was encoded again."""
        try:
            return await self._load_now(version)
        except EncodedAgain as again:
            try:
                return await self._load_now(again.version)
            except EncodedAgain as repeated:
                raise unstable(repeated) from repeated

    async def _load_now(self, version: Version) -> Version:
        await self.registry.prefix(_key(version), version.key_values_bytes, partial(self.encodings.load, version))
        return version

    async def require_authority(self, by: Principal) -> None:
        """Check once more who asks for a change, after its body has arrived and before anything is read or loaded for
        it. The transaction that writes checks it again.

        Raises:
            Unauthenticated, NotFound: `by` has no authority any more.
        """
        await read_catalog(prove, self._database, by)

    async def pin(self, version: Version, by: Principal, *, pinned: bool) -> None:
        """Load a version because a caller wishes it; `pinned` keeps it in memory.

        Raises:
            Unauthenticated, NotFound: `by` has no authority any more; nothing is pinned then.
        """
        await self.load(version)
        add = partial(self.audit.add, by, "residency.loaded", version.tenant, _name(version), pinned=pinned)
        await to_thread.run_sync(add)
        loaded = await self.load(version)  # it may have been evicted while the change was recorded
        self.registry.pin(_key(loaded), pinned=pinned)

    async def unload_all(self, tenant: str, adapter: str, by: Principal) -> None:
        """Takes all versions of an adapter out of memory; the audit names the latest one, and those that were there.

        Raises:
            Unauthenticated, NotFound: `by` has no authority any more, or there is no such adapter.
        """
        latest = await self.resolve(tenant, Reference(adapter))
        present = [VersionName(*key[:4]) for key in self.registry.versions() if key[:2] == (tenant, adapter)]
        await self.unload(latest, by)
        for version in present:
            if version.number != latest.number:
                await self.unload(version, by)

    async def unload(self, version: Version | VersionName, by: Principal) -> None:
        """Take a version out of memory; the next request loads it again.

        Raises:
            Unauthenticated, NotFound: `by` has no authority any more; the version stays in memory then.
        """
        await to_thread.run_sync(self.audit.add, by, "residency.unloaded", version.tenant, _name(version))
        self.registry.forget(VersionKey(version.tenant, version.adapter, version.number, version.digest))

    def residency(self, version: Version | VersionName) -> dict[str, bool | str]:
        """Whether a version is resident and pinned, and on which device."""
        return self.registry.state(VersionKey(version.tenant, version.adapter, version.number, version.digest))

    async def delete(self, tenant: str, reference: Reference, by: Principal) -> None:
        """Delete an adapter, or the version that a number or digest names; transfers under way complete.

        Raises:
            InvalidRequest: another selector.
            NotFound: there is no such thing.
            Conflict: an alias points at the version.
        """
        if reference.explicit and not reference.immutable:
            raise InvalidRequest(f"delete by version number or digest, not by {reference.selector!r}")
        await to_thread.run_sync(self.catalog.delete, tenant, reference, by)

    async def delete_tenant(self, tenant: str, by: Principal) -> None:
        """Delete a tenant with all it has; transfers under way complete.

        Raises:
            NotFound: there is no such tenant.
        """
        await to_thread.run_sync(self.tenants.delete, tenant, by)

    def on_changes(self, changes: Sequence[Change]) -> None:
        """Take what was deleted or encoded again out of memory, whichever process did it, and end uploads that have
        lost their key or tenant."""
        self.publisher.on_changes(changes)
        tenants, adapters = set[str](), set[tuple[str, str]]()
        for change in changes:
            match change:
                case TenantDeleted(tenant):
                    tenants.add(tenant)
                case AdapterDeleted(tenant, adapter):
                    adapters.add((tenant, adapter))
                case VersionDeleted() | VersionEncoded():
                    self.registry.forget(VersionKey(change.tenant, change.adapter, change.version, change.digest))
                case EverythingChanged():
                    self.registry.forget_where(lambda _: True)
        if tenants or adapters:
            self.registry.forget_where(lambda version: version.tenant in tenants or version[:2] in adapters)


def _name(version: Version | VersionName) -> str:
    return f"{version.tenant}/{version.adapter}@{version.number}"


def _key(version: Version) -> VersionKey:
    return VersionKey(version.tenant, version.adapter, version.number, version.digest, version.key_values)
