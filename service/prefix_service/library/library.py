"""Prefixes: resolve, plan, serve and load."""

import contextlib
import time
from collections.abc import AsyncIterator, Callable, Mapping
from functools import partial
from typing import BinaryIO

from prefix_service.catalog.records import Principal, Version
from prefix_service.catalog.remembered import RememberedVersions
from prefix_service.catalog.threads import read_catalog
from prefix_service.errors import NotFound
from prefix_service.library.digests import BodyDigests
from prefix_service.library.encodings import EncodedAgain, Encodings, unstable
from prefix_service.library.plan import (
    Limits,
    MixedPlan,
    MixedRequest,
    MixedVersions,
    Plan,
    PrefixRequest,
    make_file,
    make_mixed_plan,
    make_plan,
    require_few_rows,
)
from prefix_service.library.shared_files import SharedFiles
from prefix_service.prefix.kv import PrefixKV
from prefix_service.prefix.references import Reference
from prefix_service.prefix.wire.digests import Algorithm
from prefix_service.prefix.wire.masks import InputMask
from prefix_service.prefix.wire.prefix_file import Slot
from prefix_service.prefix.wire.rendering import Rendering
from prefix_service.registry.admission import Admission
from prefix_service.registry.keys import RenderingKey, VersionKey
from prefix_service.registry.registry import AdapterRegistry
from prefix_service.registry.tier import Lease, Leases

OnLoad = Callable[[Version, float], object]
"""Is called with a version whose tensors were read, and the seconds that it took, also if it failed."""


class Library:
    """The versions of one catalog and their tensors, for callers that are already authorised."""

    def __init__(
        self,
        versions: RememberedVersions,
        encodings: Encodings,
        registry: AdapterRegistry,
        limits: Limits,
        admission: Admission,
        shared_files: SharedFiles | None = None,
    ) -> None:
        self._versions, self._encodings, self._registry = versions, encodings, registry
        self._limits, self._admission = limits, admission
        self._digests = BodyDigests(admission)
        self._shared_files = shared_files

    async def resolve(self, tenant: str, reference: Reference) -> Version:
        """Returns the version that a reference means now.

        Raises:
            NotFound: there is no such version.
        """
        known = self._versions.get(tenant, reference)
        return await read_catalog(self._resolve, tenant, reference) if known is None else known

    def _resolve(self, tenant: str, reference: Reference) -> Version:
        version = self._versions.resolve(tenant, reference)
        _ = version.prefix_config  # parsed here, so that the event loop need not
        return version

    async def resolve_for(self, by: Principal, tenant: str, reference: Reference) -> Version:
        """Returns the version that a reference means now, for a caller that may not see every tenant.

        Raises:
            NotFound: there is no such version, or it is another tenant's; the message is the same.
        """
        if not by.may_see(tenant):
            raise NotFound(f"there is no {tenant}/{reference}")
        return await self.resolve(tenant, reference)

    def is_current(self, version: Version, reference: Reference) -> bool:
        """Returns whether a reference is known to mean this version still, without reading the catalog."""
        return self._versions.get(version.tenant, reference) is version

    def plan(self, version: Version, request: PrefixRequest, mask: InputMask | None = None) -> Plan:
        """Everything of an answer but its tensors. It takes milliseconds where there are many layers: blocking.

        Raises:
            InvalidRequest: an option is out of bounds, or contradicts the mask.
        """
        return make_plan(version, request, mask, self._limits)

    def tensors(self, version: Version, request: PrefixRequest, mask: InputMask) -> Mapping[str, Slot]:
        """Returns the tensors of an answer by name, without a plan, with which it takes three times as long. Blocking.

        Raises:
            InvalidRequest: an option is out of bounds, or contradicts the mask.
        """
        return make_file(version, request, mask, self._limits).tensors

    def plan_mixed(self, rows: MixedVersions, request: MixedRequest, mask: InputMask | None) -> MixedPlan:
        """Everything of an answer for many adapters but its tensors. Blocking.

        Raises:
            InvalidRequest: the rows do not fit together, or an option is out of bounds or contradicts rows or mask.
        """
        return make_mixed_plan(rows, request, mask, self._limits)

    def require_few_rows(self, rows: int) -> None:
        """Checks the number of rows of a batch for many adapters, before their references are read.

        Raises:
            InvalidRequest: there are more than a batch may have.
        """
        require_few_rows(rows, self._limits)

    @contextlib.asynccontextmanager
    async def renderings(self, plan: MixedPlan, on_load: OnLoad | None = None) -> AsyncIterator[list[list[Rendering]]]:
        """Leases the renderings of every prefix in a plan's rows, in host memory while the block runs; one per version.

        Nothing else in such an answer depends on the stored bits, so the plan stays valid if a version is encoded
        again.

        Raises:
            OutOfSpace: together they do not fit the memory budget.
            CorruptBlob, StorageFailed: stored tensors cannot be read.
            Unavailable, Overloaded: the memory budget does not allow it now.
        """
        plans = {planned.etag: planned for row in plan.rows for planned in row}
        async with contextlib.AsyncExitStack() as stack:
            found = await self._entered(stack, list(plans.values()), on_load)
            known = dict(zip(plans, found, strict=True))
            yield [[known[planned.etag] for planned in row] for row in plan.rows]

    async def _entered(
        self, stack: contextlib.AsyncExitStack, plans: list[Plan], on_load: OnLoad | None
    ) -> list[Rendering]:
        """Enters a lease of each plan, or of the plan that replaces it after its version was encoded again."""
        renewed: set[Version] = set()
        while True:
            try:
                return await stack.enter_async_context(Leases([self.rendering(plan, None, on_load) for plan in plans]))
            except EncodedAgain as again:
                if again.version in renewed:
                    raise unstable(again) from again
                renewed.add(again.version)
                key = key_of(again.version).whole
                plans = [plan.renewed(again.version) if key_of(plan.version).whole == key else plan for plan in plans]

    @contextlib.asynccontextmanager
    async def current_rendering(self, plan: Plan, on_load: OnLoad | None = None) -> AsyncIterator[Rendering]:
        """Leases the tensors of an answer whose head does not depend on the stored bits.

        They are the plan's, or those of the version after it was encoded again.

        Raises:
            CorruptBlob, StorageFailed: the stored tensors cannot be read.
            OutOfSpace, Unavailable, Overloaded: the memory budget does not allow it now.
        """
        async with contextlib.AsyncExitStack() as stack:
            (rendering,) = await self._entered(stack, [plan], on_load)
            yield rendering

    def rendering(
        self, plan: Plan, digest: Algorithm | None = None, on_load: OnLoad | None = None
    ) -> Lease[RenderingKey, Rendering]:
        """Returns a lease of a plan's tensors, which are in host memory while its block runs.

        `digest` is the algorithm that the caller will pass to `body_digest`, if any: the digest can then be computed
        while the tensors are read. If the tensors are not in memory, `on_load` is called in a thread, for the one
        caller whose lease loads them.

        The block raises:
            EncodedAgain: the stored tensors were lost, and others replaced them: plan again (`Plan.renewed`).
            CorruptBlob, StorageFailed: the stored tensors cannot be read.
            OutOfSpace, Unavailable, Overloaded: the memory budget does not allow it now.
        """
        version, variant = plan.version, plan.file.variant
        key = RenderingKey(key_of(version), variant.dtypes, variant.layers, variant.kv_heads)
        load = partial(self._load, version, plan, digest, on_load)
        share = None if self._shared_files is None else partial(self._shared_files.share, plan.file)
        return self._registry.rendering(key, plan.file.rendering_nbytes, version.key_values_bytes, load, share)

    async def body_digest(self, plan: Plan, rendering: Rendering, algorithm: Algorithm) -> bytes | None:
        """Returns the digest of the whole body (RFC 9530), computed once per entity tag and algorithm.

        Returns None for the SHA-256 of a long body that repeats rows.
        """
        return await self._digests.of(plan, rendering, algorithm)

    def known_digest(self, plan: Plan, algorithm: Algorithm) -> bytes | None:
        """Returns the digest of the whole body if it was computed before, else None."""
        return self._digests.known(plan, algorithm)

    def _load(self, version: Version, plan: Plan, digest: Algorithm | None, on_load: OnLoad | None) -> PrefixKV:
        began = time.perf_counter()
        try:
            return self._encodings.load(version, self._digests.observing(plan, digest))
        finally:
            if on_load is not None:
                on_load(version, time.perf_counter() - began)

    async def open_weights(self, version: Version) -> BinaryIO:
        """Returns the weights file, byte for byte as it was uploaded, verified in its tenant's turn. The caller closes
        it.

        Raises:
            CorruptBlob, StorageFailed: the stored bytes cannot be read.
        """
        return await self._admission.run(version.tenant, partial(self._encodings.open_weights, version))

    def clear_failures(self, version: Version) -> None:
        """Forgets that a version could not be loaded, after its stored bytes were repaired."""
        self._registry.clear_failures(key_of(version))

    async def load(self, version: Version) -> Version:
        """Loads a version into memory; returns it, with other keys and values if it was encoded again.

        Raises:
            CorruptBlob, StorageFailed: the stored tensors cannot be read.
            OutOfSpace, Unavailable, Overloaded: the memory budget does not allow it now.
        """
        try:
            return await self._load_now(version)
        except EncodedAgain as again:
            try:
                return await self._load_now(again.version)
            except EncodedAgain as repeated:
                raise unstable(repeated) from repeated

    async def _load_now(self, version: Version) -> Version:
        await self._registry.prefix(key_of(version), version.key_values_bytes, partial(self._encodings.load, version))
        return version


def key_of(version: Version) -> VersionKey:
    """Returns the identity of a version in memory, with its keys and values."""
    return VersionKey(version.tenant, version.adapter, version.number, version.digest, version.key_values)
