"""Leases that begin together are all granted or none is, and two such groups never wait for each other."""

import asyncio
import contextlib
from collections.abc import Sequence

import pytest

from prefix_service.errors import CorruptBlob, OutOfSpace, Overloaded, Unavailable
from prefix_service.prefix.variant import DtypePair
from prefix_service.prefix.wire.rendering import Rendering
from prefix_service.registry.keys import RenderingKey, VersionKey
from prefix_service.registry.registry import AdapterRegistry
from prefix_service.registry.tier import Leases
from tests.registry.test_registry import SIZE, Loader, held, leased, registry_of, used, version, whole


@pytest.fixture
def anyio_backend() -> str:
    """Returns asyncio, whose own tasks the registry uses."""
    return "asyncio"


def together(registry: AdapterRegistry, loaders: Sequence[Loader]) -> Leases[RenderingKey, Rendering]:
    """Returns leases of renderings of the versions that these loaders bring."""
    return Leases([registry.rendering(whole(load.number), SIZE, SIZE, load) for load in loaders])


def readers(registry: AdapterRegistry) -> int:
    """Returns the number of leases that have not ended."""
    return registry._renderings.report().readers


async def test_values_come_in_their_order_and_are_held_until_the_end() -> None:
    registry, loaders = registry_of(), [Loader(2), Loader(1)]
    async with together(registry, loaders) as values:
        assert [value.buffers["key_value"][0, 0, 0, 0, 0].item() for value in values] == [2, 1]
        assert (readers(registry), used(registry)[1]) == (2, 2 * SIZE)
        with pytest.raises(Unavailable):
            async with leased(registry, Loader(3), 3):
                pass
    assert readers(registry) == 0
    async with leased(registry, Loader(3), 3):
        pass


async def test_loads_run_side_by_side() -> None:
    registry, loaders = registry_of(), [held(), held()]
    loaders[1].number = 2
    async with asyncio.TaskGroup() as tasks:

        async def read() -> None:
            async with together(registry, loaders):
                pass

        tasks.create_task(read())
        for loader in loaders:
            await loader.waiting()
        for loader in loaders:
            loader.go_on.set()


async def test_what_is_there_is_not_loaded_again_and_counts_as_used() -> None:
    registry, loaders = registry_of(), [Loader(1), Loader(2)]
    for _ in range(3):
        async with together(registry, loaders):
            pass
    assert [loader.calls for loader in loaders] == [1, 1]
    report = registry._renderings.report()
    assert (report.misses, report.hits, report.waits) == (2, 4, 0)
    assert {entry.uses for _, entry in registry._renderings.residency.items()} == {2}


async def test_more_than_the_budget_is_refused_before_anything_is_loaded() -> None:
    registry, loaders = registry_of(), [Loader(1), Loader(2), Loader(3)]
    with pytest.raises(OutOfSpace, match=f"{3 * SIZE} bytes are needed in memory, and one request may hold {2 * SIZE}"):
        async with together(registry, loaders):
            pass
    assert [loader.calls for loader in loaders] == [0, 0, 0]
    assert used(registry) == (0, 0)


async def test_none_is_held_where_one_finds_no_room() -> None:
    """If there is no room for the second rendering, the lease of the first ends too."""
    registry = registry_of()
    async with leased(registry, Loader(1)):
        with pytest.raises(Unavailable):
            async with together(registry, [Loader(2), Loader(3)]):
                pass
        assert readers(registry) == 1
    async with together(registry, [Loader(2), Loader(3)]):
        pass


@pytest.mark.parametrize("order", [(1, 2), (2, 1)])
async def test_the_first_failure_is_told_whichever_comes_first(order: tuple[int, int]) -> None:
    registry = registry_of()
    loaders = [held(), held()]
    for number, loader in enumerate(loaders, 1):
        loader.number, loader.error = number, CorruptBlob(f"number {number}")

    async def read() -> None:
        async with together(registry, loaders):
            pass

    task = asyncio.create_task(read())
    for loader in loaders:
        await loader.waiting()
    for number in order:
        loaders[number - 1].go_on.set()
        await asyncio.sleep(0.05)
    with pytest.raises(CorruptBlob, match="number 1"):
        await task
    assert (readers(registry), used(registry)) == (0, (0, 0))


async def test_two_who_need_each_others_room_come_one_after_the_other() -> None:
    """Two groups that each need all that a request may hold are served one after the other."""
    registry = registry_of(rendering_bytes=8 * SIZE, patience=60)

    async def read(first: int) -> None:
        loaders = [Loader(first), Loader(first + 1)]
        sizes = zip(loaders, (SIZE, 3 * SIZE), strict=True)
        async with Leases([registry.rendering(whole(load.number), size, SIZE, load) for load, size in sizes]):
            await asyncio.sleep(0.001)

    async with asyncio.TaskGroup() as tasks, leased(registry, Loader(9), 9):
        tasks.create_task(read(1))
        tasks.create_task(read(3))
        await asyncio.sleep(0.2)
    assert readers(registry) == 0


async def test_a_batch_that_waits_holds_up_no_other_tenants() -> None:
    """A waiting batch holds neither bytes nor a turn, so its neighbour's batch is served immediately."""
    registry = registry_of(rendering_bytes=8 * SIZE, patience=60)
    async with contextlib.AsyncExitStack() as stack:
        for number in range(4):
            await stack.enter_async_context(leased(registry, Loader(number), number))
        waiting = asyncio.create_task(together(registry, [Loader(7), Loader(8)]).__aenter__())
        await asyncio.sleep(0)
        neighbours = [
            RenderingKey(VersionKey("beta", "b", number, "d"), DtypePair.both("float32"), (0, 1), (0, 1))
            for number in (1, 2)
        ]
        async with (
            asyncio.timeout(60),
            Leases([registry.rendering(key, SIZE, SIZE, Loader(key.version.version)) for key in neighbours]),
        ):
            assert not waiting.done()
            assert used(registry)[1] == 6 * SIZE
    await waiting


async def test_a_request_may_hold_a_half_where_its_tenant_holds_nothing_else() -> None:
    """A batch may hold a half of the budget together while its tenant holds nothing else, whatever others hold."""
    registry = registry_of(device_bytes=16 * SIZE, rendering_bytes=8 * SIZE)
    other = RenderingKey(VersionKey("beta", "b", 1, "d"), DtypePair.both("float32"), (0, 1), (0, 1))
    async with registry.rendering(other, 2 * SIZE, SIZE, Loader()):
        async with together(registry, [Loader(number) for number in range(1, 5)]):
            pass
        async with leased(registry, Loader(5), 5):
            with pytest.raises(Overloaded, match="answers of tenant 'acme'"):
                async with together(registry, [Loader(number) for number in range(1, 5)]):
                    pass
    assert readers(registry) == 0


async def test_who_gives_up_leaves_nothing_behind() -> None:
    registry, loaders = registry_of(), [held(), Loader(2)]

    async def read() -> None:
        async with together(registry, loaders):
            pass

    task = asyncio.create_task(read())
    await loaders[0].waiting()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    loaders[0].go_on.set()
    async with together(registry, [Loader(1), Loader(2)]):
        assert readers(registry) == 2
    assert readers(registry) == 0


async def test_a_version_that_is_forgotten_meanwhile_is_still_given() -> None:
    registry, loader = registry_of(), held()

    async def read() -> float:
        async with together(registry, [loader, Loader(2)]) as values:
            return float(values[0].buffers["key_value"][0, 0, 0, 0, 0])

    task = asyncio.create_task(read())
    await loader.waiting()
    registry.forget(version(1))
    loader.go_on.set()
    assert await task == 1
