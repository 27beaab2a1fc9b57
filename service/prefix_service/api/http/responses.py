"""Responses of bytes: conditions, ranges, and buffers that are sent one after another."""

from abc import ABC, abstractmethod
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import BinaryIO, Final

from anyio import to_thread
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from prefix_service.api.http.negotiation import is_current, requested_range, wanted_digest
from prefix_service.api.http.presence import while_connected
from prefix_service.api.http.served import FIRST_BYTE, SERVED, note_load, served
from prefix_service.catalog.records import Version
from prefix_service.library.encodings import EncodedAgain, unstable
from prefix_service.library.library import Library
from prefix_service.library.plan import Plan
from prefix_service.prefix.file_names import WEIGHTS_NAME
from prefix_service.prefix.variant import MEDIA_TYPE
from prefix_service.prefix.wire.digests import Algorithm, format_digest
from prefix_service.prefix.wire.rendering import Rendering

_CHUNK: Final = 1 << 20

DRAIN: Final = "drain"
"""Key in the scope's state, if the server is ours: a function that waits until nearly all output has left."""

Fields = list[tuple[bytes, bytes]]
Chunks = Iterable[bytes | memoryview] | AsyncIterable[bytes | memoryview]


@dataclass(frozen=True, slots=True)
class Content:
    """Bytes of a body that are ready to be sent, and the header fields that depend on them."""

    chunks: Chunks
    fields: Fields = field(default_factory=list)


class RawResponse(Response, ABC):
    """Sends its head and body itself. `Response.__init__` is not called, since it would encode a body."""

    def __init__(self) -> None:
        self.background = None  # FastAPI sets it where a route has background tasks

    @abstractmethod
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request."""


class BytesResponse(RawResponse):
    """A safetensors file with a known entity tag and length: answers 304, 206 or 200, with backpressure.

    It keeps no state of a request, so one instance can answer many.
    """

    def __init__(self, etag: str, length: int, headers: Mapping[str, str]) -> None:
        super().__init__()
        self._etag, self._length = etag, length
        self._entity_fields = _raw({"ETag": etag, **headers})
        self._common = _raw({"Content-Type": MEDIA_TYPE, "Accept-Ranges": "bytes", "X-Content-Type-Options": "nosniff"})

    @abstractmethod
    def _content(self, scope: Scope, receive: Receive, start: int, stop: int) -> AbstractAsyncContextManager[Content]:
        """Yields the bytes `start:stop`; errors before the first byte are raised as PrefixServiceError."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request."""
        await self._answer(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Headers(raw=scope["headers"])
        reading = scope["method"] in ("GET", "HEAD")
        if reading and is_current(request, self._etag):
            await send({"type": "http.response.start", "status": 304, "headers": self._entity_fields})
            await send({"type": "http.response.body"})
            return
        found = requested_range(request, self._etag, self._length) if reading else None
        start, stop = found or (0, self._length)
        fields = [*self._entity_fields, *self._common, (b"content-length", b"%d" % (stop - start))]
        if found:
            scope[FIRST_BYTE] = start
            fields.append((b"content-range", b"bytes %d-%d/%d" % (start, stop - 1, self._length)))
        if scope["method"] == "HEAD":
            stop = start
        async with self._content(scope, receive, start, stop) as content:
            status = 206 if found else 200
            await send({"type": "http.response.start", "status": status, "headers": fields + content.fields})
            await send_chunks(scope, send, content.chunks)


async def send_chunks(scope: Scope, send: Send, chunks: Chunks) -> None:
    """Sends a whole body, piece by piece; returns once nearly all of it has left."""
    last: bytes | memoryview = b""
    if isinstance(chunks, AsyncIterable):
        async for chunk in chunks:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
    else:
        for chunk in chunks:
            if last:
                await send({"type": "http.response.body", "body": last, "more_body": True})
            last = chunk
    await send({"type": "http.response.body", "body": last})
    if (drain := scope.get("state", {}).get(DRAIN)) is not None:
        await drain()


class PrefixResponse(BytesResponse):
    """A planned prefix; its rendering is leased until the last byte has left."""

    def __init__(self, library: Library, plan: Plan, *, immutable: bool, varies: bool = False) -> None:
        super().__init__(plan.etag, plan.file.content_length, _version_headers(plan.version, immutable=immutable))
        if varies:
            self._entity_fields.append((b"vary", b"Accept"))
        self.version = plan.version
        self._library, self._plan = library, plan
        self._immutable, self._varies = immutable, varies
        self._served = (served(plan.version, plan.file.variant.batch_size),)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request, with another entity tag if the version had to be encoded again.

        That is known before anything is sent, since the tensors are read first.
        """
        scope[SERVED] = self._served
        try:
            await self._answer(scope, receive, send)
        except EncodedAgain as again:
            plan = self._plan.renewed(again.version)
            renewed = type(self)(self._library, plan, immutable=self._immutable, varies=self._varies)
            try:
                await renewed._answer(scope, receive, send)
            except EncodedAgain as repeated:
                raise unstable(repeated) from repeated

    @property
    def planned_nbytes(self) -> int:
        """An estimate of the memory that the plan takes, in bytes."""
        return self._plan.file.planned_nbytes

    @asynccontextmanager
    async def _content(self, scope: Scope, receive: Receive, start: int, stop: int) -> AsyncIterator[Content]:
        # The digest of repeated rows costs more than sending them, so it is computed on request only.
        algorithm = wanted_digest(Headers(raw=scope["headers"])) or ("sha-256" if self._plan.is_one_rendering else None)
        if start == stop and algorithm is None:
            yield Content(())
            return
        async with self._library.rendering(self._plan, algorithm, partial(note_load, scope)) as rendering:
            fields: Fields = []
            if algorithm is not None:
                digest = await body_digest(self._library, self._plan, rendering, algorithm, receive)
                fields += [] if digest is None else [repr_digest(algorithm, digest)]
            yield Content(self._plan.file.chunks(rendering, start, stop) if start < stop else (), fields)


async def body_digest(
    library: Library, plan: Plan, rendering: Rendering, algorithm: Algorithm, receive: Receive
) -> bytes | None:
    """Returns the digest of a plan's body; None if it costs too much, or the client has left."""
    if (found := library.known_digest(plan, algorithm)) is not None:
        return found
    return await while_connected(receive, library.body_digest(plan, rendering, algorithm))


class ParametersResponse(BytesResponse):
    """The weights file of a version, byte for byte as it was uploaded."""

    def __init__(self, library: Library, version: Version, *, immutable: bool) -> None:
        super().__init__(f'"{version.weights}"', version.weights_bytes, _version_headers(version, immutable=immutable))
        self._library, self._version = library, version
        self._entity_fields.append(repr_digest("sha-256", bytes.fromhex(version.weights.removeprefix("sha256:"))))
        self._common += _raw({"Content-Disposition": f'attachment; filename="{WEIGHTS_NAME}"'})

    @asynccontextmanager
    async def _content(self, _scope: Scope, _receive: Receive, start: int, stop: int) -> AsyncIterator[Content]:
        file = await self._library.open_weights(self._version)  # reads and hashes the whole file
        try:
            file.seek(start)
            yield Content(_read(file, stop - start))
        finally:
            file.close()


def _raw(headers: Mapping[str, str]) -> Fields:
    return [(name.lower().encode(), value.encode()) for name, value in headers.items()]


def _version_headers(version: Version, *, immutable: bool) -> dict[str, str]:
    return {
        "Cache-Control": "private, max-age=31536000, immutable" if immutable else "private, no-cache",
        "Prefix-Version": str(version.number),
        "Prefix-Digest": version.digest,
        **base_model_header(version),
    }


def base_model_header(version: Version) -> dict[str, str]:
    """Returns the header field by which a client learns that the version's base model has a fingerprint, if it has."""
    return {"Prefix-Base-Model": "known"} if version.has_fingerprint else {}


def repr_digest(algorithm: Algorithm, digest: bytes) -> tuple[bytes, bytes]:
    """Returns the header field of a body's digest (RFC 9530)."""
    return b"repr-digest", format_digest(algorithm, digest).encode()


async def _read(file: BinaryIO, count: int) -> AsyncIterator[bytes]:
    while count > 0 and (chunk := await to_thread.run_sync(file.read, min(count, _CHUNK))):
        yield chunk
        count -= len(chunk)
