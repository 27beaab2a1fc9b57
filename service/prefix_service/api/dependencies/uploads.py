"""Multipart uploads: which parts there may be, in which order and how large, read while they arrive."""

from collections.abc import Mapping
from functools import partial
from typing import Final

from fastapi import Request

from prefix_service.api.dependencies.bodies import arriving, declared_bytes
from prefix_service.api.dependencies.multipart import MultipartReader, Part
from prefix_service.errors import InvalidRequest, TooLarge, UnsafeCheckpoint
from prefix_service.library.arrivals import Upload
from prefix_service.prefix.description import MOST_CARD
from prefix_service.prefix.file_names import CARD_NAME, CONFIG_NAME, PICKLE_SUFFIXES, WEIGHTS_NAME
from prefix_service.prefix.json_text import MAX_BASE_CONFIG_BYTES, MAX_CONFIG_BYTES

BASE_CONFIG: Final = "base_model_config"
ANNOTATIONS: Final = "annotations"
_MOST_ANNOTATIONS: Final = 1 << 20  # bytes of JSON, which may write a byte of a value as six
_MOST: Final = {
    CONFIG_NAME: MAX_CONFIG_BYTES,
    BASE_CONFIG: MAX_BASE_CONFIG_BYTES,
    CARD_NAME: MOST_CARD,
    ANNOTATIONS: _MOST_ANNOTATIONS,
}
_BESIDE: Final = 2 * sum(_MOST.values())  # bytes of the other parts, and of what stands between parts, at most
_ORDER: Final = (CONFIG_NAME, BASE_CONFIG, WEIGHTS_NAME)
_BATCH: Final = 1 << 20  # bytes that a thread takes at a time

MOST_HELD: Final = _BATCH + sum(_MOST.values())
"""Bytes of an upload that are in memory at most while the rest arrives: all parts but the weights, and weights that no
thread has taken yet."""


def declared_weights(request: Request) -> int:
    """Returns the bytes of weights that an upload has at least, by its Content-Length; 0 where none is declared."""
    return max(0, declared_bytes(request) - _BESIDE)


async def read_upload(request: Request, upload: Upload, limit: int) -> Mapping[str, bytes]:
    """Writes the weights of a multipart upload into `upload`; returns its other parts by their names, among them
    `CONFIG_NAME`.

    Raises:
        InvalidRequest: malformed, out of order, incomplete, or with an unknown field.
        UnsafeCheckpoint: a field named like a pickle.
        TooLarge: weights of more than `limit` bytes, or another part of more than it may have.
        QuotaExceeded: more bytes than the tenant's quota leaves.
        RequestTimeout: it did not arrive in time.
    """
    parts = _Parts(MultipartReader(request.headers["content-type"]), upload, limit)
    pending = bytearray()
    async for piece in arriving(request, limit + _BESIDE, extends=True):
        pending += piece
        if len(pending) >= _BATCH:
            await upload.take(partial(parts.receive, bytes(pending)))
            pending.clear()
            upload.hold()
    await upload.take(partial(parts.receive, bytes(pending)))
    return parts.finished()


class _Parts:
    """The state of one multipart body: which part is arriving, and what has arrived."""

    def __init__(self, reader: MultipartReader, upload: Upload, limit: int) -> None:
        self._reader = reader
        self._upload, self._limit = upload, limit
        self._others: dict[str, bytearray] = {}
        self._seen: list[str] = []

    def receive(self, data: bytes) -> None:
        """Take the next bytes of the body. Blocking.

        Raises:
            InvalidRequest, UnsafeCheckpoint, TooLarge: as `read_upload`.
        """
        for found in self._reader.read(data):
            if isinstance(found, Part):
                self._begin_part(found.name)
            else:
                self._add_to_part(found)

    def finished(self) -> Mapping[str, bytes]:
        """Returns the parts of a complete upload by their names, without the weights."""
        missing = [name for name in (CONFIG_NAME, WEIGHTS_NAME) if name not in self._seen]
        if missing or not self._reader.is_complete:
            raise InvalidRequest(f"the upload is incomplete: {', '.join(missing) or 'its end'} missing")
        return {name: bytes(content) for name, content in self._others.items()}

    def _begin_part(self, name: str) -> None:
        if name.endswith(PICKLE_SUFFIXES):
            raise UnsafeCheckpoint(
                f"{name:.80} is a pickle, which is never opened here: turn it into safetensors on your own machine "
                "with `prefix-service convert`"
            )
        if name not in _ORDER and name not in _MOST:
            raise InvalidRequest(
                f"unknown form field {name!r:.80}: send {', '.join(_ORDER)} in this order, and before the last of them "
                f"{CARD_NAME} or {ANNOTATIONS} if you have them"
            )
        if name in self._seen or WEIGHTS_NAME in self._seen or not self._is_in_order(name):
            raise InvalidRequest(
                f"form field {name} is out of order or sent twice: send {', '.join(_ORDER)}, and {CARD_NAME} and "
                f"{ANNOTATIONS} before {WEIGHTS_NAME}"
            )
        if name == WEIGHTS_NAME and CONFIG_NAME not in self._seen:
            raise InvalidRequest(f"form field {CONFIG_NAME} must come before {WEIGHTS_NAME}")
        self._seen.append(name)
        if name != WEIGHTS_NAME:
            self._others[name] = bytearray()

    def _is_in_order(self, name: str) -> bool:
        later = _ORDER[_ORDER.index(name) :] if name in _ORDER else ()
        return not any(known in self._seen for known in later)

    def _add_to_part(self, data: bytes) -> None:
        name = self._seen[-1]
        if name == WEIGHTS_NAME:
            if self._upload.size + len(data) > self._limit:
                raise TooLarge(f"the weights have more than {self._limit} bytes")
            self._upload.write(data)
            return
        self._others[name] += data
        if len(self._others[name]) > _MOST[name]:
            raise TooLarge(f"{name} has more than {_MOST[name]} bytes")
