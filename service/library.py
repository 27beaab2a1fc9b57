"""The use cases: publish, resolve, fetch, delete, load. The only place where the rooms meet; no HTTP here."""

import contextlib
import hashlib
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import rfc8785
import torch
from anyio import to_thread
from safetensors.torch import save
from torch import Tensor

from service.blobs import BlobStore, StagedBlob
from service.body_digests import BodyDigests
from service.catalog.audit import AuditLog
from service.catalog.catalog import Catalog
from service.catalog.changes import Changes
from service.catalog.database import Database
from service.catalog.listings import Listings
from service.catalog.records import AuditEntry, NewVersion, Principal, Version, VersionName
from service.catalog.remembered import RememberedVersions
from service.catalog.tenants import Tenants
from service.encodings import Encodings
from service.errors import InvalidConfig, InvalidRequest, NotFound
from service.plan import (
    Limits,
    MixedPlan,
    MixedRequest,
    MixedVersions,
    Plan,
    PrefixRequest,
    make_mixed_plan,
    make_plan,
)
from service.prefix.checkpoint import load_weights
from service.prefix.compose import composed_config
from service.prefix.config import PrefixConfig, parse_config
from service.prefix.digests import Algorithm
from service.prefix.encoder import InitWeights, PrefixEncoder
from service.prefix.kv import PrefixKV
from service.prefix.references import Reference, parse_qualified
from service.prefix.rendering import KV_DTYPES, Rendering
from service.registry.admission import Admission
from service.registry.keys import RenderingKey, VersionKey
from service.registry.registry import AdapterRegistry
from service.registry.tier import Lease, Leases
from service.shared_files import SharedFiles

log = logging.getLogger("prefix_service")


@dataclass(frozen=True, slots=True)
class Target:
    """Where a version is published, and by whom; `make_tenant` lets the tenant come into being with it."""

    tenant: str
    adapter: str
    by: Principal
    make_tenant: bool = False


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
        self.catalog = Catalog(database)
        self.listings = Listings(database)
        self.changes = Changes(database)
        self._versions = RememberedVersions(self.catalog, self.changes)
        self.tenants = Tenants(database)
        self.audit = AuditLog(database)
        self.limits = limits
        self.admission = admission
        self._blobs = blobs
        self.registry = registry
        self.encodings = Encodings(self.catalog, blobs, registry.device, registry.host_memory)
        self._digests = BodyDigests()
        self._shared_files = shared_files

    async def stage(self) -> StagedBlob:
        """Begin an upload; the caller writes to it, and discards it in the end."""
        return await to_thread.run_sync(self._blobs.stage)

    async def publish(self, target: Target, config: PrefixConfig, weights: StagedBlob) -> tuple[Version, bool]:
        """Make trained weights a version, and whether it is new; the same content again is the same version.

        Raises:
            InvalidConfig, InvalidCheckpoint: nothing is visible then.
            NotFound: there is no such tenant.
            QuotaExceeded: the tenant's quotas do not allow it.
            OutOfSpace, StorageFailed: the disk or the catalog refused.
        """
        version, is_new = await to_thread.run_sync(self._publish, target, config, weights)
        if not is_new:
            self.registry.forgive(_key(version))
        return version, is_new

    async def publish_fresh(
        self, target: Target, config: PrefixConfig, init: InitWeights, seed: int
    ) -> tuple[Version, bool]:
        """Make an untrained prefix a version; its weights are stored as PEFT would save them.

        Raises:
            InvalidConfig: a dimension is missing, or the sizes multiply to more than an upload may have.
        """
        config.require_dimensions()
        trained = 0 if config.inference_mode else config.trainable_parameters or 0
        self._require_moderate(4 * max(trained, _elements(config)))

        def file() -> bytes:
            return save({"prompt_embeddings": PrefixEncoder.fresh(config, init, seed, torch.device("cpu")).flat()})

        return await self._publish_made(target, config, file)

    async def publish_composed(self, target: Target, sources: Sequence[tuple[str, Version]]) -> tuple[Version, bool]:
        """Make the concatenation of prefixes a version, under the names they were asked by, in their order; its weights
        are stored as PEFT would save them.

        Raises:
            InvalidRequest: they differ in a dimension or in their task.
            InvalidConfig: together they are more than an upload may have.
        """
        configs = [parse_config(version.config) for _, version in sources]
        config = composed_config([(name, found) for (name, _), found in zip(sources, configs, strict=True)])
        self._require_moderate(4 * _elements(config))

        def file() -> bytes:
            flats = [self.encodings.flat(version) for _, version in sources]
            dtype = flats[0].dtype if len({flat.dtype for flat in flats}) == 1 else torch.float32
            return save({"prompt_embeddings": torch.cat([flat.to(dtype) for flat in flats])})

        return await self._publish_made(target, config, file)

    async def _publish_made(
        self, target: Target, config: PrefixConfig, file: Callable[[], bytes]
    ) -> tuple[Version, bool]:
        weights = await self.stage()
        try:
            await to_thread.run_sync(weights.write, await to_thread.run_sync(file))
            return await self.publish(target, config, weights)
        finally:
            await to_thread.run_sync(weights.discard)

    def _require_moderate(self, nbytes: int) -> None:
        """Before they are allocated: a small projection may describe a huge prefix, a small config anything."""
        if nbytes > self.limits.upload_bytes:
            raise InvalidConfig(f"the config's sizes make {nbytes} bytes, more than {self.limits.upload_bytes}")

    def _publish(self, target: Target, config: PrefixConfig, staged: StagedBlob) -> tuple[Version, bool]:
        weights = load_weights(staged.read(), config)
        key_values_bytes = _elements(config) * weights.encoded_dtype.itemsize
        self._require_moderate(key_values_bytes)
        manifest = _canonical({"format": 1, "config": config.model_dump(mode="json"), "weights": staged.digest})
        digest = f"sha256:{hashlib.sha256(manifest).hexdigest()}"
        tenant, adapter, makes = target.tenant, target.adapter, target.make_tenant
        # Known content, or no room for it: nothing needs to be encoded.
        nbytes = staged.size + key_values_bytes + len(manifest)
        existing = self.catalog.find(tenant, adapter, digest, nbytes, make_tenant=makes)
        if existing is not None:
            staged.commit()
            return existing, False
        new = NewVersion(
            digest=digest,
            manifest=manifest.decode(),
            base_model=config.base_model_name_or_path,
            weights=staged.digest,
            weights_bytes=staged.size,
            weights_dtype=next(name for name, dtype in KV_DTYPES.items() if dtype == weights.dtype),
            key_values=self.encodings.store(self.encodings.encode(config, weights)),
            key_values_bytes=key_values_bytes,
        )
        staged.commit()
        return self.catalog.add_version(tenant, adapter, new, target.by, make_tenant=makes)

    async def resolve(self, tenant: str, reference: Reference) -> Version:
        """The version that a reference means now.

        Raises:
            NotFound: there is none.
        """
        known = self._versions.get(tenant, reference)
        return await to_thread.run_sync(self._versions.resolve, tenant, reference) if known is None else known

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

    def plan(self, version: Version, request: PrefixRequest, mask: Tensor | None = None) -> Plan:
        """Everything of an answer but its tensors.

        Raises:
            InvalidRequest: an option is out of bounds, or contradicts the mask.
        """
        return make_plan(version, request, mask, self.limits)

    def plan_mixed(self, rows: MixedVersions, request: MixedRequest, mask: Tensor | None) -> MixedPlan:
        """Everything of an answer for many adapters but its tensors.

        Raises:
            InvalidRequest: rows do not agree, or an option is out of bounds or contradicts rows or mask.
        """
        return make_mixed_plan(rows, request, mask, self.limits)

    @contextlib.asynccontextmanager
    async def renderings(self, plan: MixedPlan) -> AsyncIterator[list[list[Rendering]]]:
        """Those of every prefix in a plan's rows, together in host memory while the block runs; one of each version.

        The block raises:
            OutOfSpace: they do not fit the memory budget together.
            CorruptBlob, StorageFailed, Unavailable: as for one.
        """
        plans = {planned.etag: planned for row in plan.rows for planned in row}
        async with Leases([self.rendering(planned) for planned in plans.values()]) as found:
            known = dict(zip(plans, found, strict=True))
            yield [[known[planned.etag] for planned in row] for row in plan.rows]

    def rendering(self, plan: Plan, digest: Algorithm | None = None) -> Lease[RenderingKey, Rendering, VersionKey]:
        """The tensors of a plan, in host memory while the block runs. `digest` names the algorithm that the caller will
        pass to `body_digest`, if any: it can be computed while the tensors are read.

        The block raises:
            CorruptBlob, StorageFailed: the stored tensors cannot be read.
            OutOfSpace, Unavailable: the memory budget does not allow it now.
        """
        version, form = plan.version, plan.message.form
        key = RenderingKey(_key(version), form.dtype, form.layers, form.kv_heads)
        load = partial(self._load, version, plan, digest)
        place = None if self._shared_files is None else partial(self._shared_files.place, plan.message)
        return self.registry.rendering(key, plan.message.rendering_nbytes, version.key_values_bytes, load, place)

    async def body_digest(self, plan: Plan, rendering: Rendering, algorithm: Algorithm) -> bytes:
        """Return the digest of the whole body (RFC 9530), computed once for each entity tag and algorithm."""
        return await self._digests.of(plan, rendering, algorithm)

    def _load(self, version: Version, plan: Plan, digest: Algorithm | None) -> PrefixKV:
        return self.encodings.load(version, self._digests.observing(plan, digest))

    async def load(self, version: Version) -> None:
        """Bring a version into memory now, and wait."""
        await self.registry.prefix(_key(version), version.key_values_bytes, partial(self.encodings.load, version))

    async def pin(self, version: Version, by: Principal, *, pinned: bool) -> None:
        """The same, at somebody's wish; `pinned` keeps it there."""
        await self.load(version)
        self.registry.pin(_key(version), pinned=pinned)
        add = partial(self.audit.add, by, "residency.loaded", version.tenant, _name(version), pinned=pinned)
        await to_thread.run_sync(add)

    async def unload_all(self, tenant: str, adapter: str, by: Principal) -> None:
        """Takes all versions of an adapter out of memory; the audit names the latest one, and those that were there.

        Raises:
            NotFound: there is no such adapter.
        """
        latest = await self.resolve(tenant, Reference(adapter))
        present = [VersionName(*key) for key in self.registry.versions() if key[:2] == (tenant, adapter)]
        await self.unload(latest, by)
        for version in present:
            if version.number != latest.number:
                await self.unload(version, by)

    async def unload(self, version: Version | VersionName, by: Principal) -> None:
        """Take a version out of memory; the next request loads it again."""
        self.registry.forget(_key(version))
        await to_thread.run_sync(self.audit.add, by, "residency.unloaded", version.tenant, _name(version))

    def residency(self, version: Version | VersionName) -> dict[str, bool | str]:
        """Whether a version is resident and pinned, and on which device."""
        return self.registry.state(_key(version))

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

    def hear(self, changes: Sequence[AuditEntry]) -> None:
        """What was deleted, here or by another process, leaves memory."""
        tenants = {change.target for change in changes if change.action == "tenant.deleted"}
        adapters = {tuple(change.target.split("/")) for change in changes if change.action == "adapter.deleted"}
        if tenants or adapters:
            self.registry.forget_where(lambda version: version.tenant in tenants or version[:2] in adapters)
        for change in changes:
            if change.action == "version.deleted":
                tenant, reference = parse_qualified(change.target)
                for number, digest in zip(change.details["versions"], change.details["digests"], strict=True):
                    self.registry.forget(VersionKey(tenant, reference.adapter, number, digest))


def _elements(config: PrefixConfig) -> int:
    return config.num_virtual_tokens * (config.prefix_embedding_dim or 0)


def _name(version: Version | VersionName) -> str:
    return f"{version.tenant}/{version.adapter}@{version.number}"


def _key(version: Version | VersionName) -> VersionKey:
    return VersionKey(version.tenant, version.adapter, version.number, version.digest)


def _canonical(manifest: dict[str, Any]) -> bytes:
    try:
        return rfc8785.dumps(manifest)
    except ValueError as error:  # also a lone surrogate in a key, which rfc8785 leaves to the codec
        raise InvalidConfig(f"the config cannot be written as canonical JSON (RFC 8785): {error}") from error
