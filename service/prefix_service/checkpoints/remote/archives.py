"""Takes single files out of an archive that came from elsewhere; the archive names nothing on this machine."""

import contextlib
import gzip
import io
import shutil
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Final

from prefix_service.errors import InvalidCheckpoint, TooLarge

_MOST_MEMBERS: Final = 1000
_MOST_HEADERS: Final = 4 << 20
"""The most bytes of an unpacked archive that are not the contents of its files."""
_BLOCK: Final = 512  # bytes, to a multiple of which a file in an archive is filled up
_GZIP: Final = b"\x1f\x8b"


def archived_files(archive: Path, most: int) -> dict[str, int]:
    """Returns the sizes of the files in a tar archive, compressed by gzip or not, by path.

    Raises:
        InvalidCheckpoint: the archive is damaged, or has a link, a device, a sparse file, a path that is absolute or
            has `..`, two files of one path, too many files, or too much beside their contents.
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
        with (
            archive.open("rb") as packed,
            contextlib.closing(_unpacked(packed)) as unpacked,
            tarfile.open(fileobj=(content := _Content(unpacked)), mode="r|") as tar,
        ):
            for member in tar:
                path = PurePosixPath(member.name)
                if path.is_absolute() or ".." in path.parts:
                    raise InvalidCheckpoint(
                        f"the archive has the path {member.name!r:.100}: it leads out of the folder"
                    )
                if not (member.isreg() or member.isdir()) or member.issparse():
                    raise InvalidCheckpoint(
                        f"{member.name!r:.100} in the archive is a link, a device or sparse, not a plain file"
                    )
                if member.isdir():
                    continue
                if str(path) in seen or len(seen) == _MOST_MEMBERS:
                    raise InvalidCheckpoint(
                        f"the archive has {member.name!r:.100} twice, or more than {_MOST_MEMBERS} files"
                    )
                seen[str(path)] = member.size
                if sum(seen.values()) > most:
                    raise TooLarge(f"the archive's files have more than {most} bytes")
                content.left += member.size + _BLOCK
                yield str(path), member, tar
    except (tarfile.TarError, zlib.error, EOFError, OSError, ValueError) as error:
        raise InvalidCheckpoint(f"the archive cannot be read: {error}") from error


class _Content(io.RawIOBase):
    """An unpacked archive, of which `left` more bytes may be read.

    `tarfile` reads headers into memory whatever their size, and a few packed bytes can unpack to gigabytes of them.
    """

    def __init__(self, unpacked: io.BufferedIOBase) -> None:
        super().__init__()
        self._unpacked = unpacked
        self.left = _MOST_HEADERS

    def read(self, size: int = -1, /) -> bytes:
        """Returns at most `size` bytes, fewer at the end.

        Raises:
            InvalidCheckpoint: more was read than is allowed.
        """
        piece = self._unpacked.read(size)
        self.left -= len(piece)
        if self.left < 0:
            raise InvalidCheckpoint(
                f"the archive has more than {_MOST_HEADERS} bytes beside its files' contents: pack the adapter's files "
                "alone"
            )
        return piece


def _unpacked(packed: io.BufferedReader) -> io.BufferedIOBase:
    """Returns the archive without its compression, if it has one."""
    is_compressed = packed.read(len(_GZIP)) == _GZIP
    packed.seek(0)
    return gzip.open(packed) if is_compressed else packed
