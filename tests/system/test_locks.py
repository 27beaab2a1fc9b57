"""`system.locks` admits one process at a time with flock(2)."""

import fcntl
import os
import stat
from pathlib import Path

import pytest

from prefix_service.system.locks import locked

NOT_WAITING = fcntl.LOCK_EX | fcntl.LOCK_NB


def test_only_one_holds_a_lock(tmp_path: Path) -> None:
    """A second descriptor cannot take the lock until the block has ended, even by an exception."""
    with locked(tmp_path / "lock"), pytest.raises(BlockingIOError), locked(tmp_path / "lock", NOT_WAITING):
        pass
    with pytest.raises(ZeroDivisionError), locked(tmp_path / "lock", NOT_WAITING) as handle:
        _ = 1 / (os.fstat(handle).st_size)
    with locked(tmp_path / "lock", NOT_WAITING):
        pass


def test_several_share_a_lock(tmp_path: Path) -> None:
    """Shared locks exclude exclusive ones, and not each other."""
    with (
        locked(tmp_path / "lock", fcntl.LOCK_SH),
        locked(tmp_path / "lock", fcntl.LOCK_SH | fcntl.LOCK_NB),
        pytest.raises(BlockingIOError),
        locked(tmp_path / "lock", NOT_WAITING),
    ):
        pass


def test_a_new_file_is_its_owners_alone(tmp_path: Path) -> None:
    """A lock file has mode 0600, whatever the umask."""
    before = os.umask(0)
    try:
        with locked(tmp_path / "lock"):
            pass
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "lock").stat().st_mode) == 0o600


def test_a_folder_is_locked_and_a_missing_file_is_not_made(tmp_path: Path) -> None:
    """`flags` decide whether a folder is opened, and whether a missing file is created."""
    flags = os.O_RDONLY | os.O_DIRECTORY
    with locked(tmp_path, flags=flags), pytest.raises(BlockingIOError), locked(tmp_path, NOT_WAITING, flags):
        pass
    with pytest.raises(FileNotFoundError), locked(tmp_path / "missing", flags=os.O_RDWR):
        pass
