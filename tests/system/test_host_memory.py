"""`system.host_memory`: memory for what is read at once."""

import mmap
import resource

import pytest

from prefix_service.system.host_memory import host_memory


@pytest.mark.parametrize("nbytes", [0, 1, (32 << 20) - 1, 32 << 20, (33 << 20) + 3])
def test_memory_is_as_large_as_asked_and_writable(nbytes: int) -> None:
    """To the byte, small and large."""
    memory = host_memory(nbytes)
    assert (len(memory), memory.readonly, memory.format) == (nbytes, False, "B")
    memory[:] = b"x" * nbytes
    assert memory == b"x" * nbytes


def test_large_memory_goes_back_with_its_last_view() -> None:
    """A view of a part keeps the whole."""
    memory = host_memory(32 << 20)
    block, part = memory.obj, memory[5:6]
    assert isinstance(block, mmap.mmap)
    memory.release()
    with pytest.raises(BufferError):
        block.close()
    part.release()
    block.close()


def test_no_memory_left() -> None:
    """As of every allocator: the registry lets something leave then, and tries again."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (64 << 30, hard))
    try:
        with pytest.raises(MemoryError, match="the system gives no 70368744177664 bytes"):
            host_memory(1 << 46)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
