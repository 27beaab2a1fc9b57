"""Files that commands write: checked before the work begins, and whole or not there."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from prefix_service.errors import InvalidRequest
from prefix_service.system.disk import translated


def check_output(path: Path) -> None:
    """Look whether a file can be written, before the work of which it is the result.

    Raises:
        InvalidRequest: it is a folder or a device, or there is no folder for it.
    """
    if path.is_dir():
        raise InvalidRequest(f"cannot write {path}: it is a folder; name a file in it")
    if path.exists() and not path.is_file():  # a new file would take its place, even that of /dev/null
        raise InvalidRequest(f"cannot write {path}: it is no regular file; name another")
    if not path.parent.is_dir():
        raise InvalidRequest(f"cannot write {path}: there is no folder {path.parent}; make it first")


@contextlib.contextmanager
def written(path: Path) -> Iterator[Path]:
    """Yields the path of a file beside `path`, which takes its place once the block has written it. A block that fails
    leaves `path` as it was.

    Raises:
        OutOfSpace: the disk or its quota is full.
        StorageFailed: the disk refused.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with translated(f"write {path}"):
        try:
            yield aside
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
