"""`AdapterRegistry`: what is in memory now, loaded once for all who wait, evicted under byte budgets."""

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Final, Generic, Protocol, TypeVar

import torch
from anyio import to_thread

from service.errors import InvalidInput, Unavailable
from service.prefix.kv import PrefixKV, Span
from service.prefix.wire import KVDtype, Rendering, render
from service.registry.residency import Entry, K, Residency


class Sized(Protocol):
    """Something that takes memory."""

    @property
    def nbytes(self) -> int: ...


V = TypeVar("V", bound=Sized)

_DEVICE: Final = re.compile(r"cpu|cuda(?::([0-9]{1,3}))?")


@dataclass(frozen=True, slots=True)
class VersionKey:
    """The identity of what is resident: never a name alone, so that no tenant meets another's tensors."""

    tenant: str
    adapter: str
    version: int
    digest: str


@dataclass(frozen=True, slots=True)
class RenderingKey:
    """The identity of a rendering: a version, and what was made of it."""

    version: VersionKey
    dtype: KVDtype
    layers: Span
    kv_heads: Span


class _Tier(Generic[K, V]):
    """One budget and the values under it; loads are single-flight and outlive the waiters that give up."""

    def __init__(self, budget: int) -> None:
        self.residency: Residency[K] = Residency(budget)
        self._values: dict[K, V] = {}
        self._loads: dict[K, asyncio.Task[V]] = {}

    async def get(self, key: K, nbytes: int, load: Callable[[], Awaitable[V]]) -> V:
        """The value of `key`; its bytes are reserved before `load` allocates them."""
        async with self.lease(key, nbytes, load) as value:
            return value

    @contextlib.asynccontextmanager
    async def lease(self, key: K, nbytes: int, load: Callable[[], Awaitable[V]]) -> AsyncIterator[V]:
        """The value of `key`, not evicted from the reservation of its bytes until the block ends."""
        if key in self._values:
            self.residency.touch(key)
        elif key not in self._loads:
            for victim in self.residency.admit(key, nbytes):
                del self._values[victim]
            self._loads[key] = asyncio.create_task(self._load(key, self.residency.lease(key), load))
        entry = self.residency.lease(key)
        try:
            value = self._values.get(key)
            # A waiter that is cancelled must not take the load away from the others.
            yield await asyncio.shield(self._loads[key]) if value is None else value
        finally:
            self.residency.release(entry)

    async def _load(self, key: K, reservation: Entry, load: Callable[[], Awaitable[V]]) -> V:
        try:
            value = await load()
        except BaseException:
            if self.residency.holds(key, reservation):
                self.residency.remove(key)
            raise
        finally:
            self.residency.release(reservation)
            if self._loads.get(key) is asyncio.current_task():
                del self._loads[key]
        if self.residency.holds(key, reservation):
            self._values[key] = value
        return value

    def remove(self, matches: Callable[[K], bool]) -> None:
        """Forget values and loads; what is being sent stays alive until its last byte has left."""
        for key in [key for key in (*self._values, *self._loads) if matches(key)]:
            self._values.pop(key, None)
            self._loads.pop(key, None)
            self.residency.remove(key)


class AdapterRegistry:
    """Resident prefixes on one device, and their renderings in host memory.

    A resident prefix is a trained encoder in inference form: the keys and values themselves. All methods run on one
    event loop; loading, casting and copying run in threads.
    """

    def __init__(self, device: torch.device, device_bytes: int, rendering_bytes: int) -> None:
        self.device = device
        self._prefixes: _Tier[VersionKey, PrefixKV] = _Tier(device_bytes)
        self._renderings: _Tier[RenderingKey, Rendering] = _Tier(rendering_bytes)

    async def prefix(self, key: VersionKey, nbytes: int, load: Callable[[], PrefixKV]) -> PrefixKV:
        """A prefix of `nbytes` on the device; `load` brings it to the CPU, in a thread, once for all who wait.

        Raises:
            OutOfSpace: it does not fit the budget.
            Unavailable: everything else is in use.
        """

        return await self._prefixes.get(key, nbytes, self._on_device(load))

    @contextlib.asynccontextmanager
    async def rendering(
        self, key: RenderingKey, nbytes: int, prefix_nbytes: int, load: Callable[[], PrefixKV]
    ) -> AsyncIterator[Rendering]:
        """A rendering of `nbytes`, not evicted while the block runs; made from the prefix if need be.

        Raises:
            OutOfSpace: it does not fit the budget.
            Unavailable: everything else is in use.
        """

        async def rendered() -> Rendering:
            async with self._prefixes.lease(key.version, prefix_nbytes, self._on_device(load)) as kv:
                return await to_thread.run_sync(_render, kv, key)

        async with self._renderings.lease(key, nbytes, rendered) as rendering:
            yield rendering

    def _on_device(self, load: Callable[[], PrefixKV]) -> Callable[[], Awaitable[PrefixKV]]:
        return lambda: to_thread.run_sync(lambda: load().to(device=self.device))

    def pin(self, key: VersionKey, *, pinned: bool) -> None:
        """Keep a resident version, or let it go again.

        Raises:
            Unavailable: it is to be kept, and was unloaded meanwhile.
        """
        if key in self._prefixes.residency:
            self._prefixes.residency.pin(key, pinned=pinned)
        elif pinned:
            raise Unavailable(f"{key.tenant}/{key.adapter}@{key.version} has left memory meanwhile: load it again")

    def state(self, key: VersionKey) -> dict[str, bool | str]:
        """Whether a version is resident and pinned, and where."""
        residency = self._prefixes.residency
        return {"resident": key in residency, "pinned": residency.is_pinned(key), "device": str(self.device)}

    def forget(self, key: VersionKey) -> None:
        """Unload a version and its renderings; transfers under way complete."""
        self._prefixes.remove(lambda resident: resident == key)
        self._renderings.remove(lambda rendering: rendering.version == key)


def _render(kv: PrefixKV, key: RenderingKey) -> Rendering:
    with torch.inference_mode():
        return render(kv.sliced(key.layers, key.kv_heads), key.dtype)


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
