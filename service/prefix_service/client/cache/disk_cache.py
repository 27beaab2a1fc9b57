"""A cache of prefix bodies on disk: they outlive a worker, and the processes of one machine share them.

Each entry is one file, `<name>.v2.prefix`: a magic number, the length of a JSON record, the record, its SHA-256, the
body. The name is a hash of service, key, reference and variant; the record repeats it, with the entity tag, the body's
size and CRC-32C, and the service's catalog if it was named. All of it is verified on every read; a file that does not
fit is not an entry. A file is written under a temporary name and renamed, so a reader sees all of an entry or nothing.
Nothing is synced: an entry that is torn by a power failure is damaged, and is fetched again.

Earlier releases wrote `<name>.prefix` with another magic number, some with the body of another adapter. Those files are
never read; they are removed when a cache is opened, makes room or is cleared.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import stat
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, Final

from prefix_service.client.protocol import Buffer
from prefix_service.errors import InvalidRequest
from prefix_service.prefix.wire.digests import digest_of

_MAGIC: Final = b"PREFIX\x00\x02"
_OLD_MAGIC: Final = b"PREFIX\x00\x01"
_LENGTH: Final = struct.Struct("<I")
_MAX_RECORD: Final = 4096
_SEAL: Final = hashlib.sha256().digest_size
_NAME: Final = re.compile(r"[0-9a-f]{64}\.v2\.prefix")
_OLD_NAME: Final = re.compile(r"[0-9a-f]{64}\.prefix")
_TEMPORARY: Final = ".writing-"
_ABANDONED_AFTER: Final = 3600.0  # seconds after which an unfinished file is taken for an ended process's

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Entry:
    """A body, its entity tag, and the catalog that it came from, if the service named it."""

    body: Buffer
    etag: str
    catalog: str | None = None


class DiskCache:
    """A cache bounded by bytes; the least recently used entry is dropped first. Threads and local processes share it.

    `identity` distinguishes this service and its caller from others: an entry is found only under its own identity.

    Raises:
        InvalidRequest: the folder cannot be created, or others may write to it.
    """

    def __init__(self, folder: Path, budget: int, identity: tuple[str | None, ...]) -> None:
        self._folder, self._budget, self._identity = folder, budget, identity
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = folder.stat()
        except OSError as error:
            raise InvalidRequest(f"cache_dir {folder} cannot be used: {error}") from error
        if found.st_uid != os.geteuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise InvalidRequest(f"others may write to cache_dir {folder}: choose a folder of your own (chmod 700)")
        with contextlib.suppress(OSError):
            self._remove_old()

    def load(self, key: tuple[Any, ...], allocate: Callable[[int], memoryview]) -> Entry | None:
        """Returns the entry of a key, in memory from `allocate`; None if there is no sound one."""
        path = self._path(key)
        try:
            with path.open("rb") as file:
                entry = _read(file, path.name, allocate)
        except OSError:
            return None
        with contextlib.suppress(OSError):  # another process may have removed it
            _mark_used(path)
        return entry

    def store(self, key: tuple[Any, ...], entry: Entry) -> None:
        """Stores a body. One that exceeds the budget alone is not kept; a disk that refuses is a warning in the log."""
        path = self._path(key)
        fields = {
            "name": path.name,
            "etag": entry.etag,
            "size": len(entry.body),
            "crc32c": digest_of("crc32c", entry.body).hex(),
            "catalog": entry.catalog,
        }
        record = json.dumps(fields).encode()
        head = _MAGIC + _LENGTH.pack(len(record)) + record + hashlib.sha256(record).digest()
        size = len(head) + len(entry.body)
        if size > self._budget or len(record) > _MAX_RECORD:
            return
        try:
            self._make_room(size)
            self._write(path, head, entry.body)
        except OSError as error:
            log.warning("prefix cache %s: %s is not kept: %s", self._folder, path.name, error)

    def remove(self, key: tuple[Any, ...]) -> None:
        """Removes the entry of a key."""
        _remove(self._path(key))

    def clear(self) -> None:
        """Removes every entry in the folder, whichever service it came from."""
        with contextlib.suppress(FileNotFoundError):  # a folder that was removed has no entries
            self._remove_old()
            for found in self._files():
                _remove(found.path)

    def _remove_old(self) -> None:
        """Removes the entries of earlier releases; a file that merely has such a name stays."""
        with os.scandir(self._folder) as found:
            for file in found:
                if _OLD_NAME.fullmatch(file.name) and _is_old(file.path):
                    _remove(file.path)

    def _path(self, key: tuple[Any, ...]) -> Path:
        named = hashlib.sha256(json.dumps([self._identity, key]).encode()).hexdigest()
        return self._folder / f"{named}.v2.prefix"

    def _write(self, path: Path, head: bytes, body: Buffer) -> None:
        number, temporary = tempfile.mkstemp(prefix=_TEMPORARY, dir=self._folder)  # mode 0600
        try:
            with os.fdopen(number, "wb", buffering=0) as file:
                for part in (memoryview(head), memoryview(body)):
                    written = 0
                    while written < len(part):
                        written += file.write(part[written:])
            _mark_used(temporary)
            Path(temporary).replace(path)
        except BaseException:
            _remove(temporary)
            raise

    def _make_room(self, size: int) -> None:
        """Removes the least recently used entries until `size` more bytes fit the budget."""
        self._remove_old()
        entries, used = [], size
        for file in self._files():
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                found = file.stat()
                if file.name.startswith(_TEMPORARY) and time.time() - found.st_mtime > _ABANDONED_AFTER:
                    _remove(file.path)
                    continue
                used += found.st_size
                if not file.name.startswith(_TEMPORARY):
                    entries.append((found.st_mtime_ns, found.st_size, file.path))
        for _, freed, path in sorted(entries):
            if used <= self._budget:
                return
            _remove(path)
            used -= freed

    def _files(self) -> Iterator[os.DirEntry[str]]:
        with os.scandir(self._folder) as found:
            yield from (file for file in found if _NAME.fullmatch(file.name) or file.name.startswith(_TEMPORARY))


def _mark_used(path: Path | str) -> None:
    """Sets the modification time. The kernel's own has a granularity of up to 10 ms, in which two uses would tie."""
    now = time.time_ns()
    os.utime(path, ns=(now, now))


def _read(file: BufferedReader, name: str, allocate: Callable[[int], memoryview]) -> Entry | None:
    """Returns the entry in a file, or None if it is not sound."""
    start = file.read(len(_MAGIC) + _LENGTH.size)
    if len(start) < len(_MAGIC) + _LENGTH.size or not start.startswith(_MAGIC):
        return None
    (length,) = _LENGTH.unpack(start[len(_MAGIC) :])
    if length > _MAX_RECORD:
        return None
    record, seal = file.read(length), file.read(_SEAL)
    if hashlib.sha256(record).digest() != seal:
        return None
    try:
        fields = json.loads(record)
        size, etag, checksum = int(fields["size"]), str(fields["etag"]), str(fields["crc32c"])
        catalog = None if fields.get("catalog") is None else str(fields["catalog"])
        is_its_own = fields["name"] == name
    except (ValueError, KeyError, TypeError):
        return None
    if not is_its_own or size < 0 or os.fstat(file.fileno()).st_size != file.tell() + size:
        return None
    body = allocate(size)
    if file.readinto(body) != size or digest_of("crc32c", body).hex() != checksum:
        return None
    return Entry(body, etag, catalog)


def _is_old(path: str) -> bool:
    try:
        with Path(path).open("rb") as file:
            return file.read(len(_OLD_MAGIC)) == _OLD_MAGIC
    except OSError:
        return False


def _remove(path: str | Path) -> None:
    with contextlib.suppress(OSError):
        Path(path).unlink()
