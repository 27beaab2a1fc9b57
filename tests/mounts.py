"""Mounts file systems for a test: small ones that fill up, and read-only views. Only root may mount."""

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.missing import not_tested


@contextmanager
def small_disk(folder: Path, nbytes: int) -> Iterator[None]:
    """Mounts a disk of so many bytes in memory until the block ends."""
    folder.mkdir(parents=True, exist_ok=True)
    if refused := refusal("-t", "tmpfs", "-o", f"size={nbytes}", "tmpfs", str(folder)):
        not_tested(f"nothing can be mounted here: {refused}")
    try:
        yield
    finally:
        unmount(folder)


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Makes a folder read-only until the block ends, except for files that are open; skips where that cannot be."""
    with ExitStack() as stack:
        try:
            stack.enter_context(laid_read_only(folder))
        except OSError as error:
            not_tested(str(error))
        yield


@contextmanager
def laid_read_only(folder: Path) -> Iterator[None]:
    """Makes a folder read-only until the block ends, except for files that are open.

    Raises:
        OSError: nothing can be mounted here.
    """
    with TemporaryDirectory() as view:
        # Made beside the folder and laid over it: a mount where a file was opened for writing cannot become read-only.
        mounted: list[str] = []
        try:
            for arguments in (
                ("--bind", str(folder), view),
                ("-o", "remount,bind,ro", view),
                ("--bind", view, str(folder)),
            ):
                if refused := refusal(*arguments):
                    raise OSError(f"{folder} cannot be made read-only: {refused}")
                if arguments[0] == "--bind":
                    mounted.append(arguments[2])
            yield
        finally:
            for place in reversed(mounted):
                unmount(Path(place))


def refusal(*arguments: str) -> str | None:
    """Mounts something; returns why it could not, or None."""
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else (done.stderr.strip() or f"exit status {done.returncode}")


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


def unmount(folder: Path) -> None:
    """Unmounts a folder, even if files in it are open."""
    subprocess.run(["umount", "--lazy", str(folder)], check=True)
