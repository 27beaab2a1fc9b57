"""`system.locks`: one process at a time, as flock(2) has it."""

import fcntl
import os
import stat
from pathlib import Path

import pytest

from prefix_service.system.locks import locked

NOT_WAITING = fcntl.LOCK_EX | fcntl.LOCK_NB


def test_only_one_holds_a_lock(tmp_path: Path) -> None:
    """Another descriptor of the file does not get it; after the block, even one that raised, it is free."""
    with locked(tmp_path / "lock"), pytest.raises(BlockingIOError), locked(tmp_path / "lock", NOT_WAITING):
        pass
    with pytest.raises(ZeroDivisionError), locked(tmp_path / "lock", NOT_WAITING) as handle:
        _ = 1 / (os.fstat(handle).st_size)
    with locked(tmp_path / "lock", NOT_WAITING):
        pass


def test_several_share_a_lock(tmp_path: Path) -> None:
    """A shared lock excludes exclusive ones alone."""
    with (
        locked(tmp_path / "lock", fcntl.LOCK_SH),
        locked(tmp_path / "lock", fcntl.LOCK_SH | fcntl.LOCK_NB),
        pytest.raises(BlockingIOError),
        locked(tmp_path / "lock", NOT_WAITING),
    ):
        pass


def test_a_new_file_is_its_owners_alone(tmp_path: Path) -> None:
    """Whatever the umask."""
    before = os.umask(0)
    try:
        with locked(tmp_path / "lock"):
            pass
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "lock").stat().st_mode) == 0o600


def test_a_folder_is_locked_and_a_missing_file_is_not_made(tmp_path: Path) -> None:
    """`flags` decide what is opened."""
    flags = os.O_RDONLY | os.O_DIRECTORY
    with locked(tmp_path, flags=flags), pytest.raises(BlockingIOError), locked(tmp_path, NOT_WAITING, flags):
        pass
    with pytest.raises(FileNotFoundError), locked(tmp_path / "missing", flags=os.O_RDWR):
        pass
