"""Maps the file of the service that an answer names, instead of receiving a body, for a worker on the same host.

Every mapping is private: nobody else sees what is written to it. It lives as long as a tensor in it, whatever happens
to the file's name.
"""

import logging
import os
import stat
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from prefix_service.client.protocol import Answer, Fetch, require_success
from prefix_service.errors import InvalidResponse
from prefix_service.prefix.variant import MEDIA_TYPE, SHARED_FILE_TYPE

_MOST_ANSWER: Final = 16 << 10  # bytes; a path has up to 4,096
_FLAGS: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY  # neither a pipe nor a link can be opened

log = logging.getLogger(__name__)


ACCEPTING_FILES: Final[Mapping[str, str]] = {"Accept": f"{SHARED_FILE_TYPE}, {MEDIA_TYPE}"}
"""The header that asks for the name of a file, if there is one."""


def read_shared(fetch: Fetch, answer: Answer, peer_uid: int | None) -> Any | None:
    """Returns the result of `fetch` for an answer, or for the file that it names.

    Returns None if the file cannot be reached, or has other contents, so that the bytes must be asked for. `peer_uid`
    is the user of the process that listens on the socket, if the system reports it.

    Raises:
        InvalidResponse: the answer names a file that does not belong to the service, root or this process's user.
        PrefixServiceError: the service reported the error, or the fetch refused an answer that names no file.
    """
    if answer.headers.get("content-type") != SHARED_FILE_TYPE:
        return fetch.read(require_success(answer))
    path, size, digest = _parse_file_name(answer)
    try:
        body = _mapped(path, size, {peer_uid, 0, os.geteuid()})
    except (OSError, ValueError) as error:  # evicted a moment ago, behind another mount or group, or not a path at all
        log.debug("%s cannot be mapped: %s", path, error)
        return None
    headers = {name: value for name, value in answer.headers.items() if name != "repr-digest"}
    if digest is not None:
        headers["repr-digest"] = digest
    try:
        return fetch.read(replace(answer, headers=headers, body=body, digest=None))
    except InvalidResponse as error:
        log.warning("%s is not used, its bytes are asked for: %s", path, error)
        return None


def _parse_file_name(answer: Answer) -> tuple[str, int, str | None]:
    """Returns the file's path and size, and the digest of its contents if it was asked for.

    Raises:
        InvalidResponse: the answer does not name a file.
    """
    fields = answer.json() if len(answer.body) <= _MOST_ANSWER else None
    if isinstance(fields, dict):
        path, size, digest = fields.get("file"), fields.get("bytes"), fields.get("repr_digest")
        is_digest = digest is None or isinstance(digest, str)
        if isinstance(path, str) and path.startswith("/") and "\0" not in path and type(size) is int and is_digest:
            return path, size, digest
    raise InvalidResponse(f"the answer names no file that could be mapped: {bytes(answer.body[:200])!r}")


def _mapped(path: str, size: int, owners: set[int | None]) -> memoryview:
    from prefix_service.client.cache.memory import map_for_many

    handle = os.open(path, _FLAGS)
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode) or found.st_mode & 0o222 or not 0 < size == found.st_size:
            raise InvalidResponse(f"{path} is not a file of {size} bytes that nobody writes to")
        if found.st_uid not in owners:
            raise InvalidResponse(f"{path} belongs to user {found.st_uid}, who is not the service's: it is not mapped")
        return map_for_many(handle, size)
    finally:
        os.close(handle)
