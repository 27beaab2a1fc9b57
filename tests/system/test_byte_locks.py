"""`system.byte_locks` excludes threads and processes from the same byte, not from others."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from prefix_service.system.byte_locks import byte_locked


def test_a_byte_is_held_once(tmp_path: Path) -> None:
    """Another thread waits for the byte, or is told that it is held; other bytes are free, also far ones."""
    path = tmp_path / "lock"

    def wait() -> bool:
        with byte_locked(path, 7) as is_held:
            return is_held

    with ThreadPoolExecutor(1) as pool:
        with byte_locked(path, 7) as first, byte_locked(path, 2**60 - 1) as far:
            assert (first, far) == (True, True)
            waiting = pool.submit(wait)
            with byte_locked(path, 7, waits=False) as again:
                assert not again
            with pytest.raises(TimeoutError):
                waiting.result(0.2)
        assert waiting.result(60)
    with byte_locked(path, 7, waits=False) as again:
        assert again


def test_a_dead_process_holds_nothing(tmp_path: Path) -> None:
    """Another process's lock holds while it lives, and ends with it."""
    path = tmp_path / "lock"
    program = (
        "import sys, pathlib\n"
        "from prefix_service.system.byte_locks import byte_locked\n"
        f"with byte_locked(pathlib.Path({str(path)!r}), 7):\n"
        "    print('held', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    other = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with byte_locked(path, 7, waits=False) as mine:
            assert not mine
        other.kill()
        other.wait(60)
        with byte_locked(path, 7, waits=False) as mine:
            assert mine
