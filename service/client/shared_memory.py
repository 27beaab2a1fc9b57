"""An answer that names a file of the service: mapped, not copied, by a worker on the same host.

The mapping is private: what is written to it reaches nobody else. It lives as long as a tensor in it, whatever becomes
of the file's name.
"""

import logging
import mmap
import os
import stat
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from service.client.protocol import Answer
from service.errors import InvalidResponse
from service.prefix.form import MEDIA_TYPE, SHARED_FILE_TYPE

_MOST_TOLD: Final = 16 << 10  # bytes: a path has up to 4,096
_FLAGS: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY  # nothing that a pipe or a link could do

log = logging.getLogger(__name__)


ACCEPTING_FILES: Final[Mapping[str, str]] = {"Accept": f"{SHARED_FILE_TYPE}, {MEDIA_TYPE}"}
"""The header that asks for the name of a file, if there is one."""


def in_shared_memory(answer: Answer) -> Answer | None:
    """The answer with the body that it names; as it is if it names none, None if the file cannot be reached from here.

    Raises:
        InvalidResponse: it names something else than a file of the service.
    """
    if answer.headers.get("content-type") != SHARED_FILE_TYPE:
        return answer
    path, size, digest = _told(answer)
    try:
        body = _mapped(path, size)
    except OSError as error:  # it has just been evicted, or lies behind another mount or group
        log.debug("%s cannot be mapped: %s", path, error)
        return None
    headers = dict(answer.headers)
    if digest is not None:
        headers["repr-digest"] = digest
    return replace(answer, headers=headers, body=body, digest=None)


def _told(answer: Answer) -> tuple[str, int, str | None]:
    """The file's path and size, and the digest of its content where that was asked for."""
    told = answer.json() if len(answer.body) <= _MOST_TOLD else None
    if isinstance(told, dict):
        path, size, digest = told.get("file"), told.get("bytes"), told.get("repr_digest")
        is_digest = digest is None or isinstance(digest, str)
        if isinstance(path, str) and path.startswith("/") and "\0" not in path and type(size) is int and is_digest:
            return path, size, digest
    raise InvalidResponse(f"the answer names no file that could be mapped: {bytes(answer.body[:200])!r}")


def _mapped(path: str, size: int) -> memoryview:
    handle = os.open(path, _FLAGS)
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode) or found.st_mode & 0o222 or not 0 < size == found.st_size:
            raise InvalidResponse(f"{path} is not a file of {size} bytes that nobody writes to")
        return memoryview(mmap.mmap(handle, size, access=mmap.ACCESS_COPY))
    finally:
        os.close(handle)
