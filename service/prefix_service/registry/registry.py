"""`AdapterRegistry`: what is in memory now, loaded once for all who wait, evicted under byte budgets."""

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
from prefix_service.registry.keys import RenderingKey, VersionKey
from prefix_service.registry.memory import exhausted, memory_for, of_device
from prefix_service.registry.report import TierReport
from prefix_service.registry.snapshot import Snapshot
from prefix_service.registry.tier import Lease, Tier
from prefix_service.system.turns import Turns

log = logging.getLogger("prefix_service")

T = TypeVar("T")

PATIENCE: Final = 2.0
"""Seconds that a request waits for room before it is told to come again."""

_LOADS: Final = 8  # threads: more read no faster from one disk, and a few that hang leave the others some
_DEVICE: Final = re.compile(r"cpu|cuda(?::([0-9]{1,3}))?")


class AdapterRegistry:
    """Resident prefixes on one device, and their renderings in host memory; each budget is shared by the tenants.

    A resident prefix is a trained encoder in inference form: the keys and values themselves. All methods run on one
    event loop; loading, casting and copying run in threads, tenants in turn. What finds no memory although its budget
    has room makes what may leave go and tries once more; a prefix that the device still does not take then stays in
    host memory, and its bytes go on counting against the device's budget.
    """

    def __init__(
        self, device: torch.device, device_bytes: int, rendering_bytes: int, patience: float = PATIENCE
    ) -> None:
        self.device = device
        self.host_memory = memory_for(device)  # what is to go onto the device is best read into it
        self._prefixes: Tier[VersionKey, PrefixKV, VersionKey] = Tier(
            "device", str(device), device_bytes, patience, lambda key: key.whole
        )
        self._renderings: Tier[RenderingKey, Rendering, VersionKey] = Tier(
            "host", "host", rendering_bytes, patience, lambda key: key.version.whole
        )
        self._turns = Turns(_LOADS)

    async def prefix(self, key: VersionKey, nbytes: int, load: Callable[[], PrefixKV]) -> PrefixKV:
        """A prefix of `nbytes` on the device; `load` brings it to the CPU, in a thread, once for all who wait.

        Raises:
            OutOfSpace: it does not fit the budget, or there is no memory.
            Unavailable: everything else is in use, pinned, or guaranteed to other tenants.
            PrefixServiceError: what `load` raised, now or within the last seconds.
        """
        return await self._prefixes.get(key, key.tenant, nbytes, self._on_device(key, load))

    def rendering(
        self,
        key: RenderingKey,
        nbytes: int,
        prefix_nbytes: int,
        load: Callable[[], PrefixKV],
        place: Callable[[Rendering], Rendering] | None = None,
    ) -> Lease[RenderingKey, Rendering, VersionKey]:
        """A rendering of `nbytes`, not evicted while the block runs; made from the prefix if need be, and kept where
        `place`, in the same thread, puts it.

        Raises:
            OutOfSpace, Unavailable, PrefixServiceError: as `prefix`, for either memory.
        """
        version = key.version

        async def rendered() -> Rendering:
            bring = self._on_device(version, load)
            async with self._prefixes.lease(version, version.tenant, prefix_nbytes, bring) as kv:
                return await self._run(version, lambda: _render(kv, key, place))

        return self._renderings.lease(key, version.tenant, nbytes, rendered)

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
        """One step in a thread; where it finds no memory, once more after what may leave has left."""
        for _ in range(2):
            try:
                return await self._turns.run(key.tenant, step)
            except (MemoryError, RuntimeError) as error:
                if not exhausted(error):
                    raise
                on_device = of_device(error)
            self._spare(key.tenant, on_device=on_device)
        where = f"device {self.device}" if on_device else "host"
        raise OutOfSpace(f"the {where} has no memory left for {key}: its budget is larger than what is there")

    def _spare(self, tenant: str, *, on_device: bool) -> None:
        self._prefixes.spare(tenant)
        if on_device:
            torch.cuda.empty_cache()
        else:
            self._renderings.spare(tenant)

    def pin(self, key: VersionKey, *, pinned: bool) -> None:
        """Keep a resident version, or let it go again.

        Raises:
            Unavailable: it is to be kept, and was unloaded meanwhile.
        """
        if key in self._prefixes.residency:
            self._prefixes.pin(key, pinned=pinned)
        elif pinned:
            raise Unavailable(f"{key} has left memory meanwhile: load it again")

    def state(self, key: VersionKey) -> dict[str, bool | str]:
        """Whether a version is resident and pinned, and where."""
        keys = self._prefixes.members(key.whole)
        pinned = any(self._prefixes.residency.is_pinned(one) for one in keys)
        return {"resident": bool(keys), "pinned": pinned, "device": str(self.device)}

    def forget(self, key: VersionKey) -> None:
        """Unload a version and its renderings, and forget that its load failed; transfers under way complete."""
        self._prefixes.remove(key.whole)
        self._renderings.remove(key.whole)

    def forgive(self, key: VersionKey) -> None:
        """Forget that a version could not be loaded: its bytes have just been put right."""
        self._prefixes.forgive(key.whole)
        self._renderings.forgive(key.whole)

    def forget_where(self, matches: Callable[[VersionKey], bool]) -> None:
        """Unload all versions that match."""
        for tier in (self._prefixes, self._renderings):
            tier.remove_where(matches)

    def tiers(self) -> list[TierReport]:
        """Both budgets, the device's first."""
        return [self._prefixes.report(), self._renderings.report()]

    def snapshot(self) -> Snapshot:
        """What is in memory now, to be looked through in a thread."""
        return Snapshot(self._prefixes.snapshot(), self._renderings.snapshot())

    def versions(self) -> list[VersionKey]:
        """The versions whose prefixes are in memory now, each once, whatever its keys and values are."""
        return list(dict.fromkeys(key.whole for key, _ in self._prefixes.residency.items()))


def _copied(kv: PrefixKV, device: torch.device) -> PrefixKV:
    # From the default stream's pool, not that of one of many streams; each that uses it is waited for.
    tensor = torch.empty_like(kv.tensor, device=device)
    with own_stream(device):
        tensor.copy_(kv.tensor, non_blocking=True)
    return replace(kv, tensor=tensor)


def _render(kv: PrefixKV, key: RenderingKey, place: Callable[[Rendering], Rendering] | None) -> Rendering:
    with torch.inference_mode():
        rendering = render(kv.sliced(key.layers, key.kv_heads), key.dtype)
        return rendering if place is None else place(rendering)


def choose_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:<index>`, checked against what this machine has.

    Raises:
        InvalidInput: another name, or a device that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = _DEVICE.fullmatch(name)
    if found is None:
        raise InvalidInput(f"device must be auto, cpu, cuda or cuda:<index>, got {name!r}")
    # torch.device would take cuda:999 for cuda:-25.
    if name != "cpu" and int(found[1] or 0) >= torch.cuda.device_count():
        raise InvalidInput(f"device {name} is not there: this machine has {torch.cuda.device_count()} CUDA devices")
    return torch.device(name)
