"""`system.host_memory` allocates memory for what is read in one piece."""

import mmap
import resource
import subprocess
import sys

import pytest

from prefix_service.system.host_memory import host_memory, return_freed_memory, trimmed


@pytest.mark.parametrize("nbytes", [0, 1, (32 << 20) - 1, 32 << 20, (33 << 20) + 3])
def test_memory_is_as_large_as_asked_and_writable(nbytes: int) -> None:
    """Memory has exactly the requested number of bytes, small or large, and is writable."""
    memory = host_memory(nbytes)
    assert (len(memory), memory.readonly, memory.format) == (nbytes, False, "B")
    memory[:] = b"x" * nbytes
    assert memory == b"x" * nbytes


def test_large_memory_goes_back_with_its_last_view() -> None:
    """A view of a part keeps the whole memory alive."""
    memory = host_memory(32 << 20)
    block, part = memory.obj, memory[5:6]
    assert isinstance(block, mmap.mmap)
    memory.release()
    with pytest.raises(BufferError):
        block.close()
    part.release()
    block.close()


def test_no_memory_left() -> None:
    """An allocation that the system refuses raises MemoryError, as other allocators do, for the registry to evict."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (64 << 30, hard))
    try:
        with pytest.raises(MemoryError, match="the system gives no 70368744177664 bytes"):
            host_memory(1 << 46)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_freed_memory_returns_to_the_system() -> None:
    """A process has no more memory after it used and freed 8 MiB twice; without the call glibc keeps the second."""
    script = f"""
from pathlib import Path
from {return_freed_memory.__module__} import return_freed_memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * {resource.getpagesize()}

return_freed_memory()
before = resident()
for _ in range(2):
    block = bytearray(b"x") * (8 << 20)
    del block
print(resident() - before)
"""
    grown = int(subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout)
    assert grown < 4 << 20


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_small_blocks_return_to_the_system_too() -> None:
    """64 MiB of freed blocks behind one that is kept return within seconds; without the call glibc keeps them."""
    script = f"""
import asyncio, time
from pathlib import Path
from {trimmed.__module__} import trimmed

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * {resource.getpagesize()}

async def main():
    before = resident()
    blocks = [bytearray(b"x") * (64 << 10) for _ in range(1024)]
    last = bytearray(b"x") * (64 << 10)
    del blocks
    kept = resident() - before
    async with trimmed():
        until = time.monotonic() + 60
        while resident() - before > 8 << 20 and time.monotonic() < until:
            await asyncio.sleep(0.1)
    print(kept, resident() - before)

asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    kept, left = map(int, done.stdout.split())
    assert kept > 32 << 20
    assert left < 8 << 20
