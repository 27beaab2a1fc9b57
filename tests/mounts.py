"""Mounts file systems for a test: small ones that fill up, and read-only views. Only root may mount."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.missing import not_tested


@contextmanager
def small_disk(folder: Path, nbytes: int) -> Iterator[None]:
    """Mounts a disk of so many bytes in memory until the block ends."""
    folder.mkdir(parents=True, exist_ok=True)
    _mount("-t", "tmpfs", "-o", f"size={nbytes}", "tmpfs", str(folder))
    try:
        yield
    finally:
        _unmount(folder)


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Makes a folder read-only until the block ends, except for files that are open for writing."""
    _mount("--bind", str(folder), str(folder))
    try:
        _mount("-o", "remount,bind,ro", str(folder))
        yield
    finally:
        _unmount(folder)


def fill(folder: Path, leave: int = 0) -> Path:
    """Fills the disk with a file, shortens the file by the bytes to leave, and returns it."""
    path = folder / "filler"
    with path.open("wb", buffering=0) as file:
        for size in (1 << 20, 4096):
            try:
                while file.write(b"x" * size) == size:
                    pass
            except OSError:
                pass
        file.truncate(file.tell() - leave)
    return path


def _mount(*arguments: str) -> None:
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        not_tested(f"nothing can be mounted here: {done.stderr.strip()}")


def _unmount(folder: Path) -> None:
    subprocess.run(["umount", "--lazy", str(folder)], check=True)
