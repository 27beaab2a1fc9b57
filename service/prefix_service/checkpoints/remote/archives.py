"""Takes single files out of an archive that came from elsewhere; the archive names nothing on this machine."""

import shutil
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Final

from prefix_service.errors import InvalidCheckpoint, TooLarge

_MOST_MEMBERS: Final = 1000


def archived_files(archive: Path, most: int) -> dict[str, int]:
    """Returns the sizes of the files in a compressed tar archive, by path.

    Raises:
        InvalidCheckpoint: the archive is damaged, or has a link, a device, a path that is absolute or has `..`, two
            files of one path, or too many files.
        TooLarge: the files have more than `most` bytes together.
    """
    return {path: member.size for path, member, _ in _members(archive, most)}


def extract(archive: Path, paths: dict[str, Path], most: int) -> None:
    """Writes files of an archive, each path in it to a file of this machine.

    Raises:
        InvalidCheckpoint, TooLarge: as `archived_files` does.
    """
    for path, member, tar in _members(archive, most):
        if path in paths and (content := tar.extractfile(member)) is not None:
            with paths[path].open("wb") as file:
                shutil.copyfileobj(content, file)


def _members(archive: Path, most: int) -> Iterator[tuple[str, tarfile.TarInfo, tarfile.TarFile]]:
    seen: dict[str, int] = {}
    try:
        with tarfile.open(archive, "r|*") as tar:
            for member in tar:
                path = PurePosixPath(member.name)
                if path.is_absolute() or ".." in path.parts:
                    raise InvalidCheckpoint(
                        f"the archive has the path {member.name!r:.100}: it leads out of the folder"
                    )
                if not (member.isreg() or member.isdir()):
                    raise InvalidCheckpoint(f"{member.name!r:.100} in the archive is a link or a device, not a file")
                if member.isdir():
                    continue
                if str(path) in seen or len(seen) == _MOST_MEMBERS:
                    raise InvalidCheckpoint(
                        f"the archive has {member.name!r:.100} twice, or more than {_MOST_MEMBERS} files"
                    )
                seen[str(path)] = member.size
                if sum(seen.values()) > most:
                    raise TooLarge(f"the archive's files have more than {most} bytes")
                yield str(path), member, tar
    except (tarfile.TarError, zlib.error, EOFError, OSError, ValueError) as error:
        raise InvalidCheckpoint(f"the archive cannot be read: {error}") from error
