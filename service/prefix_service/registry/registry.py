"""`AdapterRegistry`: the prefixes and renderings in memory, loaded once for all waiters, evicted under byte budgets."""

import logging
import re
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Final, TypeVar

import torch

from prefix_service.errors import InvalidInput, OutOfSpace, Unavailable
from prefix_service.prefix.kv import PrefixKV
from prefix_service.prefix.streams import own_stream
from prefix_service.prefix.wire.rendering import Rendering, render
from prefix_service.registry.allocation import exhausted, memory_for, of_device
from prefix_service.registry.keys import RenderingKey, VersionKey
from prefix_service.registry.report import TierReport
from prefix_service.registry.snapshot import Snapshot
from prefix_service.registry.tier import Lease, Tier
from prefix_service.system.turns import Turns

log = logging.getLogger("prefix_service")

T = TypeVar("T")

PATIENCE: Final = 2.0
"""Seconds that a request waits for room before it is refused."""

LEAST: Final = 16 << 10
"""Bytes that an entry counts for at least. Its Python objects take 3 KB beside its values, and a small prefix can have
as many renderings as there are ranges of its layers and heads."""

_LOADS: Final = 8  # threads: one disk reads no faster with more, and a few that hang leave others free
_DEVICE: Final = re.compile(r"cpu|cuda(?::([0-9]{1,3}))?")


class AdapterRegistry:
    """Resident prefixes on one device, and their renderings in host memory. Tenants share each budget.

    A resident prefix is a trained encoder in inference form: the keys and values themselves. All methods run on one
    event loop; threads load, cast and copy, in turns of the tenants.

    If an allocation fails although the budget has room, everything evictable is evicted and the allocation is retried
    once. A prefix that still does not fit on the device stays in host memory; its bytes still count against the device
    budget. Each entry counts for at least `least` bytes.
    """

    def __init__(
        self,
        device: torch.device,
        device_bytes: int,
        rendering_bytes: int,
        patience: float = PATIENCE,
        least: int = LEAST,
    ) -> None:
        self.device = device
        self._least = least
        self.host_memory = memory_for(device)  # allocator of memory from which a copy to the device is fastest
        self._prefixes: Tier[VersionKey, PrefixKV] = Tier(
            "device", str(device), device_bytes, patience, lambda key: key.whole
        )
        self._renderings: Tier[RenderingKey, Rendering] = Tier(
            "host", "host", rendering_bytes, patience, lambda key: key.version.whole
        )
        self._turns = Turns(_LOADS)

    async def prefix(self, key: VersionKey, nbytes: int, load: Callable[[], PrefixKV]) -> PrefixKV:
        """Returns a prefix of `nbytes` on the device. `load` reads it to the CPU in a thread, once for all waiters.

        Raises:
            OutOfSpace: it does not fit the budget, or memory is exhausted.
            Overloaded: other readers of the tenant held its part of the budget for too long.
            Unavailable: everything else is in use, pinned, or guaranteed to other tenants.
            PrefixServiceError: the error of `load`, now or within the last seconds.
        """
        return await self._prefixes.get(key, key.tenant, max(nbytes, self._least), self._on_device(key, load))

    def rendering(
        self,
        key: RenderingKey,
        nbytes: int,
        prefix_nbytes: int,
        load: Callable[[], PrefixKV],
        share: Callable[[Rendering], Rendering] | None = None,
    ) -> Lease[RenderingKey, Rendering]:
        """Returns a lease of a rendering of `nbytes`, which is not evicted while the lease's block runs.

        If it is missing, it is made from the prefix, and `share`, in the same thread, returns the rendering to keep.

        The block raises:
            OutOfSpace: prefix or rendering does not fit its budget, or memory is exhausted.
            Overloaded: other readers of the tenant held its part of a budget for too long.
            Unavailable: everything else is in use, pinned, or guaranteed to other tenants.
            PrefixServiceError: the error of `load`, now or within the last seconds.
        """
        version = key.version

        async def rendered() -> Rendering:
            bring = self._on_device(version, load)
            charged = max(prefix_nbytes, self._least)
            async with self._prefixes.lease(version, version.tenant, charged, bring) as kv:
                return await self._run(version, lambda: _render(kv, key, share))

        return self._renderings.lease(key, version.tenant, max(nbytes, self._least), rendered)

    def _on_device(self, key: VersionKey, load: Callable[[], PrefixKV]) -> Callable[[], Awaitable[PrefixKV]]:
        async def bring() -> PrefixKV:
            kv = await self._run(key, load)
            if self.device.type == "cpu":
                return kv
            try:
                return await self._run(key, lambda: _copied(kv, self.device))
            except OutOfSpace as error:
                log.warning("%s stays in host memory: %s", key, error)
                return kv

        return bring

    async def _run(self, key: VersionKey, step: Callable[[], T]) -> T:
        """Runs a step in a thread; if memory is exhausted, evicts everything evictable and runs it once more.

        Raises:
            OutOfSpace: memory is still exhausted.
        """
        for _ in range(2):
            try:
                return await self._turns.run(key.tenant, step)
            except (MemoryError, RuntimeError) as error:
                if not exhausted(error):
                    raise
                on_device = of_device(error)
            self._evict_all_for(key.tenant, on_device=on_device)
        where = f"device {self.device}" if on_device else "host"
        raise OutOfSpace(f"the {where} has no memory left for {key}: its budget is larger than what is there")

    def _evict_all_for(self, tenant: str, *, on_device: bool) -> None:
        self._prefixes.evict_all_for(tenant)
        if on_device:
            torch.cuda.empty_cache()
        else:
            self._renderings.evict_all_for(tenant)

    def pin(self, key: VersionKey, *, pinned: bool) -> None:
        """Pins a resident version, or unpins it.

        Raises:
            Unavailable: it is to be pinned, and is not resident any more.
            OutOfSpace: the tenant would pin more than it may.
        """
        if key in self._prefixes.residency:
            self._prefixes.pin(key, pinned=pinned)
        elif pinned:
            raise Unavailable(f"{key} was evicted: load it again")

    def state(self, key: VersionKey) -> dict[str, bool | str]:
        """Returns whether a version is resident and pinned, and on which device."""
        keys = self._prefixes.members(key.whole)
        pinned = any(self._prefixes.residency.is_pinned(one) for one in keys)
        return {"resident": bool(keys), "pinned": pinned, "device": str(self.device)}

    def forget(self, key: VersionKey) -> None:
        """Evicts a version and its renderings, and forgets that its load failed. Transfers in progress complete."""
        self._prefixes.remove(key.whole)
        self._renderings.remove(key.whole)

    def clear_failures(self, key: VersionKey) -> None:
        """Forgets that a version could not be loaded, after its stored bytes were repaired."""
        self._prefixes.clear_failures(key.whole)
        self._renderings.clear_failures(key.whole)

    def forget_where(self, matches: Callable[[VersionKey], bool]) -> None:
        """Evicts all versions that match."""
        for tier in (self._prefixes, self._renderings):
            tier.remove_where(matches)

    def tiers(self) -> list[TierReport]:
        """Returns the reports of both budgets, the device's first."""
        return [self._prefixes.report(), self._renderings.report()]

    def snapshot(self) -> Snapshot:
        """Returns a copy of the current state, which a thread can examine."""
        return Snapshot(self._prefixes.snapshot(), self._renderings.snapshot())

    def versions(self) -> list[VersionKey]:
        """Returns the keys of the versions whose prefixes are in memory,
        each once, whatever its keys and values are.
        """
        return list(dict.fromkeys(key.whole for key, _ in self._prefixes.residency.items()))


def _copied(kv: PrefixKV, device: torch.device) -> PrefixKV:
    # Allocated from the default stream's pool: every stream that reads the tensor is synchronised before it is freed.
    tensor = torch.empty_like(kv.tensor, device=device)
    with own_stream(device):
        tensor.copy_(kv.tensor, non_blocking=True)
    return replace(kv, tensor=tensor)


def _render(kv: PrefixKV, key: RenderingKey, share: Callable[[Rendering], Rendering] | None) -> Rendering:
    with torch.inference_mode():
        part = kv.sliced(key.layers, key.kv_heads)
        rendering = render(part, key.dtypes)
        if share is not None:
            rendering = share(rendering)
        # A view of a part would keep the whole prefix in memory when it is evicted.
        whole = kv.tensor.untyped_storage().data_ptr()
        views = {
            name: buffer.clone()
            for name, buffer in rendering.buffers.items()
            if buffer.nbytes < kv.tensor.nbytes and buffer.untyped_storage().data_ptr() == whole
        }
        return replace(rendering, buffers={**rendering.buffers, **views}) if views else rendering


def choose_device(name: str) -> torch.device:
    """Returns the device `auto`, `cpu`, `cuda` or `cuda:<index>`, if this machine has it.

    Raises:
        InvalidInput: the name is unknown, or the machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = _DEVICE.fullmatch(name)
    if found is None:
        raise InvalidInput(f"device must be auto, cpu, cuda or cuda:<index>, got {name!r}")
    # Checked here, since torch.device accepts cuda:999 and reads it as cuda:-25.
    if name != "cpu" and int(found[1] or 0) >= torch.cuda.device_count():
        raise InvalidInput(f"device {name} is not there: this machine has {torch.cuda.device_count()} CUDA devices")
    return torch.device(name)
