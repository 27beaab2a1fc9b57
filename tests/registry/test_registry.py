"""`registry.registry` on a real event loop: single flight, eviction, forgetting, failures."""

import asyncio
import contextlib
import gc
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
import torch

from prefix_service.errors import CorruptBlob, InvalidInput, OutOfSpace, Overloaded, Unavailable
from prefix_service.prefix.kv import PrefixKV
from prefix_service.prefix.variant import DtypePair
from prefix_service.prefix.wire.rendering import Rendering, render
from prefix_service.registry.keys import RenderingKey, VersionKey
from prefix_service.registry.registry import LEAST, AdapterRegistry, choose_device
from prefix_service.system import failures
from tests.missing import needs_cuda

CPU = torch.device("cpu")
SIZE = 2 * 3 * 4 * 4  # bytes of a prefix of one layer, one head, three tokens of size 4


@pytest.fixture
def anyio_backend() -> str:
    """Returns asyncio, whose own tasks the registry uses."""
    return "asyncio"


def version(number: int = 1) -> VersionKey:
    return VersionKey("acme", "a", number, f"sha256:{number}")


def whole(number: int = 1) -> RenderingKey:
    return RenderingKey(version(number), DtypePair.both("float32"), (0, 1), (0, 1))


def kv_of(number: int = 1) -> PrefixKV:
    return PrefixKV.whole(torch.full((1, 2, 1, 3, 4), float(number)))


@dataclass
class Loader:
    """A loader that counts its calls, and can be made to wait or to fail."""

    number: int = 1
    calls: int = 0
    error: Exception | None = None

    def __post_init__(self) -> None:
        self.started, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()

    def __call__(self) -> PrefixKV:
        self.calls += 1
        self.started.set()
        assert self.go_on.wait(60)
        if self.error is not None:
            raise self.error
        return kv_of(self.number)

    async def waiting(self) -> None:
        """Waits until a load is under way."""
        assert await asyncio.to_thread(self.started.wait, 60)


def held() -> Loader:
    """Returns a loader that waits for `go_on`."""
    loader = Loader()
    loader.go_on.clear()
    return loader


def registry_of(
    device_bytes: int = 4 * SIZE, rendering_bytes: int = 4 * SIZE, device: torch.device = CPU, patience: float = 0
) -> AdapterRegistry:
    """Returns a registry in which a few bytes count for no more than they are."""
    return AdapterRegistry(device, device_bytes, rendering_bytes, patience, least=0)


def used(registry: AdapterRegistry) -> tuple[int, int]:
    """Returns the bytes that are reserved on the device, and for renderings."""
    return registry._prefixes.residency.used, registry._renderings.residency.used


@asynccontextmanager
async def leased(registry: AdapterRegistry, load: Callable[[], PrefixKV], number: int = 1) -> AsyncIterator[Rendering]:
    async with registry.rendering(whole(number), SIZE, SIZE, load) as rendering:
        yield rendering


async def test_many_cold_requests_are_one_load() -> None:
    """Fifty requests for a version that is not resident share one load, and get the same value."""
    registry, load = registry_of(), held()
    tasks = [asyncio.create_task(registry.prefix(version(), SIZE, load)) for _ in range(50)]
    await load.waiting()
    load.go_on.set()
    values = await asyncio.gather(*tasks)
    assert load.calls == 1
    assert all(value is values[0] for value in values)
    assert await registry.prefix(version(), SIZE, load) is values[0]
    assert (load.calls, used(registry)) == (1, (SIZE, 0))


async def test_many_cold_renderings_are_one_rendering() -> None:
    """Fifty requests for a rendering that is not resident share one rendering."""
    registry, load = registry_of(), Loader()

    async def data_pointer() -> int:
        async with leased(registry, load) as rendering:
            return rendering.buffers["key_value"].data_ptr()

    assert len(set(await asyncio.gather(*(data_pointer() for _ in range(50))))) == 1
    assert (load.calls, used(registry)) == (1, (SIZE, SIZE))


async def test_a_waiter_that_gives_up_leaves_the_load_to_the_others() -> None:
    """Cancelling the request that began a load leaves the load to the others."""
    registry, load = registry_of(), held()
    first, second = (asyncio.create_task(registry.prefix(version(), SIZE, load)) for _ in range(2))
    await load.waiting()
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    load.go_on.set()
    assert torch.equal((await second).tensor, kv_of().tensor)
    assert load.calls == 1


async def test_a_load_that_nobody_waits_for_ends_in_memory() -> None:
    """A load whose only request was cancelled ends, and the next request finds its value."""
    registry, load = registry_of(), held()
    only = asyncio.create_task(registry.prefix(version(), SIZE, load))
    await load.waiting()
    only.cancel()
    await asyncio.sleep(0)
    load.go_on.set()
    await registry.prefix(version(), SIZE, load)
    assert load.calls == 1


async def test_a_failure_reaches_all_and_the_next_request_loads_anew() -> None:
    """All waiting requests get a failed load's error, nothing stays reserved, and the next request loads again."""
    registry, load = registry_of(), held()
    load.error = Unavailable("encoded again")
    tasks = [asyncio.create_task(registry.prefix(version(), SIZE, load)) for _ in range(5)]
    await load.waiting()
    load.go_on.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(result) for result in results] == [Unavailable] * 5
    assert (load.calls, used(registry)) == (1, (0, 0))
    load.error = None
    assert torch.equal((await registry.prefix(version(), SIZE, load)).tensor, kv_of().tensor)


async def test_a_storm_on_a_broken_version_loads_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a moment all requests get the same error immediately, for prefix or rendering, and nothing is evicted for
    them; a version that was put right is loaded again.
    """
    monkeypatch.setattr(failures, "REMEMBERED_SECONDS", 60)  # the storm takes a slow machine longer than a moment
    registry, load = registry_of(2 * SIZE), Loader(error=CorruptBlob("bit rot", 60))
    for number in (2, 3):
        await registry.prefix(version(number), SIZE, Loader(number))
    for _ in range(20):
        with pytest.raises(CorruptBlob, match="bit rot") as caught:
            await registry.prefix(version(), SIZE, load)
        with pytest.raises(CorruptBlob, match="bit rot"):
            async with leased(registry, load):
                pytest.fail("there is nothing to lease")
        assert caught.value.retry_after == 60
    assert (load.calls, registry.tiers()[0].evictions, registry.tiers()[0].failures) == (1, 1, 1)
    await registry.prefix(version(2), SIZE, Loader(2))
    registry.forget(version())
    load.error = None
    await registry.prefix(version(), SIZE, load)
    assert load.calls == 2


async def test_a_load_that_was_forgotten_leaves_no_failure_behind() -> None:
    """The registry forgets the failure of a load whose version was published or unloaded meanwhile."""
    registry, load = registry_of(), held()
    load.error = CorruptBlob("bit rot")
    task = asyncio.create_task(registry.prefix(version(), SIZE, load))
    await load.waiting()
    registry.forget(version())
    load.go_on.set()
    with pytest.raises(CorruptBlob):
        await task
    load.error = None
    await registry.prefix(version(), SIZE, load)


async def test_a_failed_rendering_reserves_nothing() -> None:
    """A failed rendering reserves bytes neither on the device nor for renderings."""
    registry, load = registry_of(), Loader(error=CorruptBlob("bit rot"))
    with pytest.raises(CorruptBlob):
        async with leased(registry, load):
            pytest.fail("there is nothing to lease")
    assert used(registry) == (0, 0)


async def test_what_is_read_once_makes_room() -> None:
    """A version that was used once is evicted for a new one, and versions that were used again stay."""
    registry = registry_of(2 * SIZE)
    loaders = {number: Loader(number) for number in (1, 2, 3)}
    for number in (1, 2, 1, 1, 3):
        await registry.prefix(version(number), SIZE, loaders[number])
    assert [registry.state(version(number))["resident"] for number in (1, 2, 3)] == [True, False, True]
    assert used(registry) == (2 * SIZE, 0)


async def test_requests_that_begin_together_do_not_evict_each_other() -> None:
    """A load is held from its reservation on; one tenant's loads hold at most a half, and the rest is Overloaded."""
    registry = registry_of(device_bytes=4 * SIZE)
    loads = (registry.prefix(version(number), SIZE, Loader(number)) for number in range(10))
    results = await asyncio.gather(*loads, return_exceptions=True)
    assert [type(result) for result in results] == [PrefixKV] * 2 + [Overloaded] * 8
    assert used(registry) == (2 * SIZE, 0)


async def test_who_finds_no_room_waits_for_it() -> None:
    """A request without room waits, within its patience, until other loads have ended."""
    registry = registry_of(device_bytes=2 * SIZE, patience=60)
    loads = (registry.prefix(version(number), SIZE, Loader(number)) for number in range(10))
    values = await asyncio.gather(*loads)
    assert [value.tensor.max().item() for value in values] == list(range(10))
    assert used(registry) == (2 * SIZE, 0)


async def test_who_waits_for_room_joins_a_load_that_begins_meanwhile() -> None:
    """Two requests that wait for room for the same version share one load."""
    registry, load = registry_of(rendering_bytes=2 * SIZE, patience=60), Loader(2)
    async with leased(registry, Loader()):
        tasks = [asyncio.create_task(leased(registry, load, 2).__aenter__()) for _ in range(2)]
        await asyncio.sleep(0.01)
        assert load.calls == 0
    first, second = await asyncio.gather(*tasks)
    assert first is second
    assert load.calls == 1


async def test_who_waits_for_room_in_vain_is_told() -> None:
    """A request without room gets Unavailable after its patience is over, and not before."""
    registry = registry_of(rendering_bytes=2 * SIZE, patience=0.05)
    async with leased(registry, Loader()):
        began = asyncio.get_running_loop().time()
        with pytest.raises(Unavailable):
            async with leased(registry, Loader(2), 2):
                pytest.fail("there was no room")
        assert asyncio.get_running_loop().time() - began >= 0.05


@pytest.mark.parametrize("how", ["unload", "unpin"])
async def test_what_may_leave_now_makes_room_for_who_waits(how: str) -> None:
    """Unloading or unpinning a version makes room for a waiting request, as the end of a lease does."""
    registry, other = registry_of(patience=60), held()
    await registry.prefix(version(), SIZE, Loader())
    registry.pin(version(), pinned=True)
    beside = asyncio.create_task(registry.prefix(version(3), SIZE, other))
    await other.waiting()
    waiting = asyncio.create_task(registry.prefix(version(2), SIZE, Loader(2)))
    await asyncio.sleep(0.01)
    assert not registry.state(version(2))["resident"]
    if how == "unload":
        registry.forget(version())
    else:
        registry.pin(version(), pinned=False)
    assert torch.equal((await waiting).tensor, kv_of(2).tensor)
    other.go_on.set()
    await beside


async def test_what_does_not_fit_is_refused_before_it_is_loaded() -> None:
    """A version above a half of the budget is refused before it is read, and the error names the setting."""
    load = Loader()
    with pytest.raises(OutOfSpace, match=rf"^{SIZE} bytes .* may hold {SIZE - 1}: .* PREFIX_DEVICE_BYTES"):
        await registry_of(device_bytes=2 * SIZE - 1).prefix(version(), SIZE, load)
    assert load.calls == 0


async def test_a_lease_is_never_evicted() -> None:
    """Another rendering finds no room while a lease is held, and finds it afterwards."""
    registry = registry_of(rendering_bytes=2 * SIZE)
    async with leased(registry, Loader()) as rendering:
        with pytest.raises(Unavailable):
            async with leased(registry, Loader(2), 2):
                pytest.fail("there was no room")
        assert torch.equal(rendering.buffers["key_value"], kv_of().tensor)
    async with leased(registry, Loader(2), 2) as second:
        assert torch.equal(second.buffers["key_value"], kv_of(2).tensor)


async def test_a_prefix_stays_while_it_is_rendered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prefix counts as used until its rendering is done."""
    registry, rendering, go_on = registry_of(device_bytes=2 * SIZE), threading.Event(), threading.Event()

    def slow(*args: object) -> Rendering:
        rendering.set()
        assert go_on.wait(60)
        return render(kv_of(), DtypePair.both("float32"))

    monkeypatch.setattr("prefix_service.registry.registry._render", slow)
    task = asyncio.create_task(leased(registry, Loader()).__aenter__())
    assert await asyncio.to_thread(rendering.wait, 60)
    with pytest.raises(Unavailable):
        await registry.prefix(version(2), SIZE, Loader(2))
    go_on.set()
    await task
    await registry.prefix(version(2), SIZE, Loader(2))


async def test_a_pinned_version_stays_until_it_is_unpinned() -> None:
    """A pinned version survives a scan and `state` reports it as pinned; unpinned it can be evicted."""
    registry = registry_of()
    await registry.prefix(version(), SIZE, Loader())
    registry.pin(version(), pinned=True)
    for number in range(2, 9):
        await registry.prefix(version(number), SIZE, Loader(number))
    assert registry.state(version()) == {"resident": True, "pinned": True, "device": "cpu"}
    registry.pin(version(), pinned=False)
    for number in [*range(2, 6)] * 8:
        await registry.prefix(version(number), SIZE, Loader(number))
    assert registry.state(version()) == {"resident": False, "pinned": False, "device": "cpu"}


async def test_what_one_tenant_pins_leaves_room_for_others() -> None:
    """All pins hold at most a half, and one tenant's a half of that; the error names the setting."""
    registry = registry_of()
    for number in (1, 2):
        await registry.prefix(version(number), SIZE, Loader(number))
    registry.pin(version(1), pinned=True)
    with pytest.raises(OutOfSpace, match=f"'acme' has pinned {SIZE} bytes.* unpin some, or raise PREFIX_DEVICE_BYTES"):
        registry.pin(version(2), pinned=True)
    assert not registry.state(version(2))["pinned"]
    registry.pin(version(1), pinned=False)
    registry.pin(version(2), pinned=True)


async def test_a_version_that_left_cannot_be_pinned() -> None:
    """Pinning a version that was evicted since its load raises Unavailable."""
    with pytest.raises(Unavailable, match="was evicted"):
        registry_of().pin(version(), pinned=True)
    registry_of().pin(version(), pinned=False)


async def test_what_is_forgotten_while_leased_stays_usable() -> None:
    """A lease outlives the forgetting of its version; its bytes count until its end, and are freed once."""
    registry = registry_of()
    async with leased(registry, Loader()) as rendering:
        registry.forget(version())
        assert used(registry) == (0, SIZE)
        async with leased(registry, Loader()) as again:
            assert again is not rendering
            assert used(registry) == (SIZE, 2 * SIZE)
        assert torch.equal(rendering.buffers["key_value"], kv_of().tensor)
    assert used(registry) == (SIZE, SIZE)


async def test_forgetting_what_is_read_does_not_free_it_for_more_readers() -> None:
    """A tenant that unloads what it still reads, and reads it again, holds no more than its part."""
    registry = registry_of(rendering_bytes=8 * SIZE)
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(4):
            await stack.enter_async_context(leased(registry, Loader()))
            registry.forget(version())
        with pytest.raises(Overloaded):
            await stack.enter_async_context(leased(registry, Loader()))
        assert used(registry)[1] == 4 * SIZE
    assert used(registry) == (0, 0)


async def test_what_is_forgotten_while_loading_does_not_stay() -> None:
    """A load that was forgotten serves its waiters; the next request loads again, and only that value stays."""
    registry, load = registry_of(), held()
    task = asyncio.create_task(registry.prefix(version(), SIZE, load))
    await load.waiting()
    registry.forget(version())
    assert used(registry) == (SIZE, 0)
    again = Loader()
    second = await registry.prefix(version(), SIZE, again)
    load.go_on.set()
    assert torch.equal((await task).tensor, kv_of().tensor)
    assert await registry.prefix(version(), SIZE, again) is second
    assert (again.calls, used(registry)) == (1, (SIZE, 0))


async def test_a_forgotten_load_ends_beside_its_successor() -> None:
    """A request that comes while a forgotten load ends joins the load that stays."""
    registry, old, new = registry_of(), held(), held()
    first = asyncio.create_task(registry.prefix(version(), SIZE, old))
    await old.waiting()
    registry.forget(version())
    second = asyncio.create_task(registry.prefix(version(), SIZE, new))
    await new.waiting()
    old.go_on.set()
    await first
    third = asyncio.create_task(registry.prefix(version(), SIZE, new))
    await asyncio.sleep(0)
    new.go_on.set()
    assert await second is await third
    assert (new.calls, used(registry)) == (1, (SIZE, 0))


async def test_what_is_forgotten_before_its_load_began() -> None:
    """Forgetting a version before the first step of its load raises nothing and leaves nothing behind."""
    registry = registry_of()
    task = asyncio.create_task(registry.prefix(version(), SIZE, Loader()))
    asyncio.get_running_loop().call_soon(registry.forget, version())
    assert torch.equal((await task).tensor, kv_of().tensor)
    assert used(registry) == (0, 0)


async def test_a_forgotten_load_that_fails_leaves_its_successor_alone() -> None:
    """A forgotten load that fails does not end the reservation of a later load of its version."""
    registry, load = registry_of(), held()
    load.error = CorruptBlob("bit rot")
    task = asyncio.create_task(registry.prefix(version(), SIZE, load))
    await load.waiting()
    registry.forget(version())
    await registry.prefix(version(), SIZE, Loader())
    load.go_on.set()
    with pytest.raises(CorruptBlob):
        await task
    assert registry.state(version())["resident"] is True
    assert used(registry) == (SIZE, 0)


async def test_forgetting_a_version_leaves_others() -> None:
    """Forgetting a version forgets its renderings, and those of no other version."""
    registry = registry_of()
    for number in (1, 2):
        async with leased(registry, Loader(number), number):
            pass
    registry.forget(version(1))
    assert used(registry) == (SIZE, SIZE)
    load = Loader(2)
    async with leased(registry, load, 2):
        assert load.calls == 0


def assert_groups_hold_what_is_resident(registry: AdapterRegistry) -> None:
    """Checks that the index by which versions are forgotten holds exactly the resident keys."""
    for tier in (registry._prefixes, registry._renderings):
        keys = sorted(str(key) for group in tier._groups.values() for key in group)
        assert keys == sorted(str(key) for key, _ in tier.residency.items())
        assert all(tier._groups.values())


async def test_what_left_is_not_looked_for_when_a_version_is_forgotten() -> None:
    """Evicted, failed and forgotten entries leave the index, so that forgetting a version costs its renderings."""
    registry = registry_of(2 * SIZE, 2 * SIZE)
    for number in (1, 2, 3):
        async with leased(registry, Loader(number), number):
            pass
    assert len(registry.snapshot().resident(1000)) == 2
    assert_groups_hold_what_is_resident(registry)
    with pytest.raises(CorruptBlob):
        await registry.prefix(version(4), SIZE, Loader(4, error=CorruptBlob("damaged")))
    assert_groups_hold_what_is_resident(registry)
    registry.forget(version(3))
    assert_groups_hold_what_is_resident(registry)


async def test_a_tenants_tensors_are_never_anothers() -> None:
    """Versions whose keys differ in any part have tensors of their own."""
    registry = registry_of(device_bytes=9 * SIZE)
    keys = [VersionKey("t", "a", 1, "d"), VersionKey("u", "a", 1, "d"), VersionKey("t", "b", 1, "d")]
    keys += [VersionKey("t", "a", 2, "d"), VersionKey("t", "a", 1, "e")]
    for number, key in enumerate(keys):
        await registry.prefix(key, SIZE, Loader(number))
    values = [await registry.prefix(key, SIZE, Loader(99)) for key in keys]
    assert [value.tensor.max().item() for value in values] == [0, 1, 2, 3, 4]


async def test_a_deleted_tenant_leaves_memory_at_once() -> None:
    """Forgetting a tenant frees its prefixes, renderings and loads; a lease goes on, and other tenants stay."""
    registry, load = registry_of(9 * SIZE, 9 * SIZE), held()
    other = VersionKey("beta", "a", 1, "sha256:1")
    await registry.prefix(other, SIZE, Loader())
    loading = asyncio.create_task(registry.prefix(version(2), SIZE, load))
    async with leased(registry, Loader()) as rendering:
        await load.waiting()
        registry.forget_where(lambda version: version.tenant == "acme")
        assert used(registry) == (2 * SIZE, SIZE)
        assert torch.equal(rendering.buffers["key_value"], kv_of().tensor)
    load.go_on.set()
    await loading
    assert used(registry) == (SIZE, 0)
    assert [row.tenant for row in registry.snapshot().resident(1000)] == ["beta"]


async def test_a_tenants_scan_leaves_the_other_its_working_set() -> None:
    """In both memories one tenant's scan leaves another tenant's working set resident."""
    registry = registry_of(20 * SIZE, 20 * SIZE)

    async def read(tenant: str, number: int) -> int:
        load = Loader(number)
        key = RenderingKey(VersionKey(tenant, "a", number, "d"), DtypePair.both("float32"), (0, 1), (0, 1))
        async with registry.rendering(key, SIZE, SIZE, load):
            return load.calls

    for number in range(18):
        await read("beta", number)
    for number in range(100):
        await read("acme", number)
    assert sum([await read("beta", number) for number in range(18)]) == 0
    assert {row.tenant: row.used // SIZE for row in registry.snapshot().shares(1000)} == {"beta": 18, "acme": 2}


async def test_what_a_registry_tells_of_itself() -> None:
    """The report has budgets, bytes, leases and counts of both memories, and each tenant's part."""
    registry, load = registry_of(6 * SIZE, 4 * SIZE), held()
    other = VersionKey("beta", "b", 1, "d")
    await registry.prefix(other, SIZE, Loader())
    await registry.prefix(other, SIZE, Loader())
    registry.pin(other, pinned=True)
    loading = [asyncio.create_task(registry.prefix(version(2), SIZE, load)) for _ in range(2)]
    async with leased(registry, Loader()):
        await load.waiting()
        device, host = registry.tiers()
        assert (device.name, device.place, device.budget, device.used, device.pinned) == (
            "device", "cpu", 6 * SIZE, 3 * SIZE, SIZE,
        )  # fmt: skip
        assert (device.entries, device.loading, device.readers) == (3, 1, 2)
        assert (device.hits, device.misses, device.waits, device.loads, device.failures) == (1, 3, 1, 2, 0)
        assert (host.name, host.place, host.used, host.readers, host.misses, host.loads) == (
            "host", "host", SIZE, 1, 1, 1,
        )  # fmt: skip
        assert host.load_seconds > 0
        rows = {(row.tenant, row.version): row for row in registry.snapshot().resident(1000)}
        first, second, third = rows["acme", 1], rows["acme", 2], rows["beta", 1]
        assert registry.snapshot().resident(1000)[0] == first
        assert (first.device_bytes, first.host_bytes, first.renderings, first.readers) == (SIZE, SIZE, 1, 1)
        assert (first.reason, second.reason, third.reason) == ("reading", "loading", "pinned")
        assert (second.uses, second.readers, third.uses, third.pinned) == (1, 2, 1, True)
        shares = [(row.tenant, row.tier, row.used, row.share) for row in registry.snapshot().shares(1000)]
        assert shares == [
            ("acme", "device", 2 * SIZE, 6 * SIZE // 4),
            ("beta", "device", SIZE, 6 * SIZE // 4),
            ("acme", "host", SIZE, 2 * SIZE),
        ]
    load.go_on.set()
    await asyncio.gather(*loading)
    registry.pin(other, pinned=False)
    assert {row.tenant: row.reason for row in registry.snapshot().resident(1000)} == {"acme": "kept", "beta": "share"}
    for number in (3, 4, 5, 6):
        await registry.prefix(version(number), SIZE, Loader(number))
    assert registry.tiers()[0].evictions == 1


async def test_what_was_evicted_is_told_with_its_reason() -> None:
    """The newest first: new and hardly used, used more but not lately, or for want of memory itself; for whom, and how
    often each was used."""
    registry, load = registry_of(2 * SIZE), Loader()
    other = VersionKey("beta", "other", 1, "sha256:b")

    def told() -> list[tuple[object, ...]]:
        rows = registry.snapshot().evicted(1000)
        assert [row.at for row in rows] == sorted((row.at for row in rows), reverse=True)
        return [(row.version, row.tier, row.nbytes, row.uses, row.for_tenant, row.reason) for row in rows]

    for number in (1, 2, 3):
        await registry.prefix(version(number), SIZE, Loader(number))
    assert told() == [(1, "device", SIZE, 0, "acme", "probation")]
    for _ in range(3):
        await registry.prefix(version(2), SIZE, load)
    await registry.prefix(other, SIZE, Loader(4))
    assert told()[0] == (3, "device", SIZE, 0, "beta", "probation")
    registry._evict_all_for("acme", on_device=False)
    assert (2, "device", SIZE, 3, "acme", "memory") in told()
    assert len(registry.snapshot().evicted(1)) == 1
    registry = registry_of(4 * SIZE)
    for number in (1, 2, 3, 4, 5, 1, 2, 3, 4, 6):  # what is loaded again soon is no longer on probation
        await registry.prefix(version(number), SIZE, Loader(number))
    assert told()[0] == (1, "device", SIZE, 0, "acme", "idle")


async def test_a_rendering_is_that_slice_in_that_dtype() -> None:
    """A rendering has the layers, heads and dtype of its key."""
    tensor = torch.arange(48.0).view(2, 2, 2, 3, 2)
    key = RenderingKey(version(), DtypePair.both("bfloat16"), (1, 2), (0, 1))
    async with registry_of(9 * SIZE).rendering(key, SIZE, 2 * SIZE, lambda: PrefixKV.whole(tensor)) as rendering:
        assert torch.equal(rendering.buffers["key_value"], tensor[1:2, :, 0:1].to(torch.bfloat16))


async def test_a_rendering_of_some_layers_does_not_hold_the_others() -> None:
    """A rendering takes the memory that it is charged for, so that a prefix which is evicted leaves memory."""
    tensor = torch.arange(48.0).view(2, 2, 2, 3, 2)
    key = RenderingKey(version(), DtypePair.both("float32"), (1, 2), (0, 2))
    async with registry_of(9 * SIZE).rendering(key, SIZE, 2 * SIZE, lambda: PrefixKV.whole(tensor)) as rendering:
        assert torch.equal(rendering.buffers["key_value"], tensor[1:2])
        assert rendering.buffers["key_value"].untyped_storage().nbytes() == rendering.nbytes


async def test_small_renderings_count_for_what_their_objects_take() -> None:
    """A budget bounds how many there are, however few bytes each of them has."""
    tensor = torch.zeros(64, 2, 1, 1, 1)
    registry = AdapterRegistry(CPU, 8 * LEAST, 8 * LEAST)
    for layer in range(64):
        key = RenderingKey(version(), DtypePair.both("float32"), (layer, layer + 1), (0, 1))
        async with registry.rendering(key, 8, tensor.nbytes, lambda: PrefixKV.whole(tensor)):
            pass
    await registry.prefix(version(2), 8, lambda: PrefixKV.whole(tensor))
    device, host = registry.tiers()
    assert (device.entries, device.used) == (2, 2 * LEAST)
    assert 0 < host.entries <= 8
    assert host.used == host.entries * LEAST


async def test_many_versions_at_once_stay_within_the_budget() -> None:
    """The budget holds at every step of a storm of requests, cancellations and unloads, and all of it is freed."""
    registry, before = registry_of(3 * SIZE, 3 * SIZE), asyncio.all_tasks()

    served: list[int] = []

    async def send(number: int) -> None:
        async with leased(registry, Loader(number), number) as rendering:
            assert max(used(registry)) <= 3 * SIZE
            await asyncio.sleep(0.001 * (number % 3))
            assert rendering.buffers["key_value"].max().item() == number
            served.append(number)

    async def request(number: int) -> None:
        while number not in served[-20:]:
            try:
                await send(number)
            except Unavailable:
                await asyncio.sleep(0.001)

    tasks = [asyncio.create_task(request(number % 5)) for number in range(200)]
    for number, task in enumerate(tasks):
        await asyncio.sleep(0)
        if number % 7 == 0:
            task.cancel()
        if number % 11 == 0:
            registry.forget(version(number % 5))
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(result) for result in results} == {type(None), asyncio.CancelledError}
    assert set(served) == set(range(5))
    if under_way := asyncio.all_tasks() - before:
        await asyncio.wait(under_way)  # loads that nobody waits for any more
    for number in range(5):
        registry.forget(version(number))
    assert used(registry) == (0, 0)


@pytest.mark.parametrize("name", ["", "tpu", "mps", "meta", "cpu0", "cuda:x", "CPU"])
def test_another_device_is_refused(name: str) -> None:
    """The error lists the device names that are known."""
    with pytest.raises(InvalidInput, match="device must be auto, cpu, cuda or cuda:<index>, got"):
        choose_device(name)


def test_a_device_that_is_not_there_is_refused() -> None:
    """The error has the number of CUDA devices."""
    with pytest.raises(InvalidInput, match=rf"this machine has {torch.cuda.device_count()} CUDA devices"):
        choose_device("cuda:999")


def test_the_cpu_is_always_there() -> None:
    """`cpu` is accepted everywhere, and `auto` chooses CUDA if it is there."""
    assert choose_device("cpu") == CPU
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@needs_cuda
async def test_a_prefix_lives_on_the_device_and_its_rendering_on_the_host() -> None:
    """The device casts a rendering to the CPU's bits and copies it to host memory."""
    registry = registry_of(device=torch.device("cuda"))
    assert (await registry.prefix(version(), SIZE, Loader())).tensor.is_cuda
    key = RenderingKey(version(), DtypePair.both("bfloat16"), (0, 1), (0, 1))
    async with registry.rendering(key, SIZE, SIZE, Loader()) as rendering:
        assert not rendering.buffers["key_value"].is_cuda
        assert torch.equal(rendering.buffers["key_value"], kv_of().tensor.to(torch.bfloat16))


@needs_cuda
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float8_e4m3fn"])
def test_the_device_rounds_as_the_cpu_does(dtype: str) -> None:
    """Device and CPU render the same bytes, because an ETag names them."""
    kv = PrefixKV.whole(torch.randn(2, 2, 2, 64, 64))
    host, device = render(kv, DtypePair.both(dtype)), render(kv.to(torch.device("cuda")), DtypePair.both(dtype))  # type: ignore[arg-type]  # parametrized
    assert torch.equal(host.buffers["key_value"].view(torch.uint8), device.buffers["key_value"].view(torch.uint8))


@needs_cuda
async def test_what_is_forgotten_frees_the_device() -> None:
    """Device memory is freed once nothing holds the forgotten value."""
    registry = registry_of(1 << 30, 1 << 30, torch.device("cuda"))
    before = torch.cuda.memory_allocated()
    big = PrefixKV.whole(torch.zeros(1, 2, 1, 1024, 1024))
    await registry.prefix(version(), big.nbytes, lambda: big)
    assert torch.cuda.memory_allocated() >= before + big.nbytes
    registry.forget(version())
    gc.collect()
    assert torch.cuda.memory_allocated() == before
