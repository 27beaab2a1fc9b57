"""If memory is exhausted below its budgets, the process lives on and reports what is missing."""

import subprocess
import sys
import textwrap

import pytest
import torch

from prefix_service.errors import OutOfSpace
from prefix_service.prefix.kv import PrefixKV
from prefix_service.prefix.variant import DtypePair
from prefix_service.registry.allocation import exhausted
from prefix_service.registry.keys import RenderingKey, VersionKey
from prefix_service.registry.registry import AdapterRegistry
from tests.missing import needs_cuda


@pytest.fixture
def anyio_backend() -> str:
    """Returns asyncio, whose own tasks the registry uses."""
    return "asyncio"


EXHAUSTING = textwrap.dedent(
    """
    import asyncio, resource
    import torch
    from prefix_service.errors import OutOfSpace
    from prefix_service.prefix.kv import PrefixKV
    from prefix_service.prefix.variant import DtypePair
    from prefix_service.registry.keys import RenderingKey, VersionKey
    from prefix_service.registry.registry import AdapterRegistry

    SIZE = 64 << 20

    def key(number):
        return VersionKey("acme", "a", number, f"sha256:{number}")

    def by_torch():
        return PrefixKV.whole(torch.zeros(1, 2, 1, SIZE >> 4, 2))

    def by_python():
        return PrefixKV.whole(torch.frombuffer(bytearray(SIZE), dtype=torch.float32).view(1, 2, 1, -1, 2))

    async def main():
        registry = AdapterRegistry(torch.device("cpu"), 1 << 40, 1 << 40)
        with open("/proc/self/statm") as statm:
            size = int(statm.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + (800 << 20),) * 2)
        for number in range(24):  # 1.5 GB
            await registry.prefix(key(number), SIZE, by_torch if number % 2 else by_python)
        print("evictions", registry.tiers()[0].evictions > 0)
        for number in range(24):
            rendering = RenderingKey(key(number), DtypePair.both("bfloat16"), (0, 1), (0, 1))
            async with registry.rendering(rendering, SIZE // 2, SIZE, by_torch) as made:
                assert made.buffers["key_value"].nbytes == SIZE // 2
        try:
            for number in range(24):
                await registry.prefix(key(number), SIZE, by_torch)
                registry.pin(key(number), pinned=True)
        except OutOfSpace as error:
            print(error)
        registry.forget_where(lambda version: version.tenant == "acme")
        print("bytes", (await registry.prefix(key(0), SIZE, by_torch)).nbytes == SIZE)

    asyncio.run(main())
    """
)


def test_an_exhausted_address_space_evicts_and_then_says_so() -> None:
    """A process with a limit that its budgets do not know loads and renders while something can be evicted, raises
    OutOfSpace when all is pinned, and loads again once something is unpinned.
    """
    ended = subprocess.run([sys.executable, "-c", EXHAUSTING], capture_output=True, text=True, timeout=400, check=False)
    assert ended.returncode == 0, ended.stderr
    evictions, words, loaded = ended.stdout.splitlines()
    assert (evictions, loaded) == ("evictions True", "bytes True")
    assert words.startswith("the host has no memory left for acme/a@")


def test_other_errors_are_not_taken_for_missing_memory() -> None:
    """`exhausted` accepts the RuntimeError of a failed allocation, and no other error."""
    assert not exhausted(RuntimeError("shapes do not match"))
    assert not exhausted(ValueError("DefaultCPUAllocator: can't allocate memory"))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert exhausted(caught.value)


@needs_cuda
async def test_an_exhausted_device_falls_back_to_host_memory() -> None:
    """If evicting does not make room on the device, the registry serves the prefix from host memory."""
    device = torch.device("cuda")
    torch.cuda.set_per_process_memory_fraction(min(1.0, (256 << 20) / torch.cuda.get_device_properties(0).total_memory))
    try:
        registry, size = AdapterRegistry(device, 1 << 40, 1 << 40), 100 << 20

        def load() -> PrefixKV:
            return PrefixKV.whole(torch.ones(1, 2, 1, size // 16, 2))

        for number in range(6):
            assert (await registry.prefix(VersionKey("acme", "a", number, "d"), size, load)).tensor.is_cuda
        assert registry.tiers()[0].evictions > 0
        for number in range(10, 13):
            key = VersionKey("acme", "a", number, "d")
            kv = await registry.prefix(key, size, load)
            registry.pin(key, pinned=True)
        assert not kv.tensor.is_cuda
        async with registry.rendering(
            RenderingKey(key, DtypePair.both("bfloat16"), (0, 1), (0, 1)), size // 2, size, load
        ) as made:
            assert made.buffers["key_value"].sum().item() == size // 4
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


async def test_what_never_finds_memory_is_out_of_space() -> None:
    """The registry retries a failed allocation once, raises OutOfSpace, and tries again at the next request."""
    registry, calls = AdapterRegistry(torch.device("cpu"), 1 << 40, 1 << 40), 0

    def load() -> PrefixKV:
        nonlocal calls
        calls += 1
        return PrefixKV.whole(torch.empty(1, 2, 1, 1 << 55, 2))

    for expected in (2, 4):
        with pytest.raises(OutOfSpace, match="the host has no memory left for acme/a@1"):
            await registry.prefix(VersionKey("acme", "a", 1, "d"), 1, load)
        assert calls == expected
    assert registry.tiers()[0].used == 0
