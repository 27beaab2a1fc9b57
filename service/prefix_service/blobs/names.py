"""Digests as names of blobs, and the error for a blob that is damaged."""

import re
from typing import Final

from prefix_service.errors import CorruptBlob, NotFound

_PREFIX: Final = "sha256:"
_HEX: Final = re.compile(r"[0-9a-f]{64}")


def hex_of(digest: str) -> str:
    """Returns the 64 hexadecimal digits of a digest.

    Raises:
        NotFound: `digest` is malformed.
    """
    name = digest.removeprefix(_PREFIX)
    if name == digest or not _HEX.fullmatch(name):
        raise NotFound(f"{digest!r:.100} is not a digest")
    return name


def path_of(digest: str) -> str:
    """Returns the path of a blob below its store's root: `<first two hex>/<64 hex>`.

    Raises:
        NotFound: `digest` is malformed.
    """
    name = hex_of(digest)
    return f"{name[:2]}/{name}"


def digest_at(name: str) -> str | None:
    """Returns the digest of the blob whose file has this name; None if the file is no blob."""
    return f"{_PREFIX}{name}" if _HEX.fullmatch(name) else None


def damaged(digest: str) -> CorruptBlob:
    """Returns the error for a blob whose bytes do not match its digest."""
    return CorruptBlob(
        f"the stored bytes of {digest} no longer match their digest; publish the same files again to mend the version",
        retry_after=60,
    )
