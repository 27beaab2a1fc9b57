"""Bytes as HTTP responses: conditions, ranges, and buffers that go out one after another."""

import base64
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import BinaryIO, Final

from anyio import to_thread
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service.api.negotiation import is_current, requested_range, wants_digest
from service.catalog.records import Version
from service.library import Library
from service.plan import Plan
from service.prefix.form import MEDIA_TYPE

_CHUNK: Final = 1 << 20

Chunks = AsyncIterator[bytes | memoryview]


class BytesResponse(Response, ABC):
    """A safetensors file of known entity tag and length: answers 304, 206 or 200, with backpressure."""

    def __init__(self, etag: str, length: int, headers: Mapping[str, str]) -> None:
        self.background = None
        self._etag, self._length = etag, length
        self._fields = {"ETag": etag, **headers}

    @abstractmethod
    def _content(self, request: Headers, start: int, stop: int) -> AbstractAsyncContextManager[Chunks]:
        """The bytes `start:stop`; what has to be known before the first byte may go into `self._fields`.

        What goes wrong before the first byte is raised as this project's error.
        """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        request = Headers(scope=scope)
        reading = scope["method"] in ("GET", "HEAD")
        if reading and is_current(request, self._etag):
            await send(self._start(304))
            await send({"type": "http.response.body"})
            return
        found = requested_range(request, self._etag, self._length) if reading else None
        start, stop = found or (0, self._length)
        self._fields |= {
            "Content-Type": MEDIA_TYPE,
            "Content-Length": str(stop - start),
            "Accept-Ranges": "bytes",
            "X-Content-Type-Options": "nosniff",
        }
        if found:
            self._fields["Content-Range"] = f"bytes {start}-{stop - 1}/{self._length}"
        if scope["method"] == "HEAD":
            stop = start
        async with self._content(request, start, stop) as chunks:
            await send(self._start(206 if found else 200))
            async for chunk in chunks:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body"})

    def _start(self, status: int) -> dict[str, object]:
        raw = [(name.lower().encode(), value.encode()) for name, value in self._fields.items()]
        return {"type": "http.response.start", "status": status, "headers": raw}


class PrefixResponse(BytesResponse):
    """A planned prefix; its rendering stays pinned until the last byte left."""

    def __init__(self, library: Library, plan: Plan, *, immutable: bool) -> None:
        super().__init__(plan.etag, plan.message.content_length, _about(plan.version, immutable=immutable))
        self._library, self._plan = library, plan

    @asynccontextmanager
    async def _content(self, request: Headers, start: int, stop: int) -> AsyncIterator[Chunks]:
        hashed = self._plan.is_one_rendering or wants_digest(request)
        if start == stop and not hashed:
            yield _each(())
            return
        async with self._library.rendering(self._plan) as rendering:
            if hashed:
                self._fields["Repr-Digest"] = _repr_digest(await self._library.body_digest(self._plan, rendering))
            yield _each(self._plan.message.chunks(rendering, start, stop))


class ParametersResponse(BytesResponse):
    """The weights file of a version, byte for byte as it was uploaded."""

    def __init__(self, library: Library, version: Version, *, immutable: bool) -> None:
        super().__init__(f'"{version.weights}"', version.weights_bytes, _about(version, immutable=immutable))
        self._library, self._version = library, version
        self._fields["Repr-Digest"] = _repr_digest(bytes.fromhex(version.weights.removeprefix("sha256:")))
        self._fields["Content-Disposition"] = 'attachment; filename="adapter_model.safetensors"'

    @asynccontextmanager
    async def _content(self, _request: Headers, start: int, stop: int) -> AsyncIterator[Chunks]:
        file = await to_thread.run_sync(self._library.open_weights, self._version)
        try:
            file.seek(start)
            yield _read(file, stop - start)
        finally:
            file.close()


def _about(version: Version, *, immutable: bool) -> dict[str, str]:
    return {
        "Cache-Control": "private, max-age=31536000, immutable" if immutable else "private, no-cache",
        "Prefix-Version": str(version.number),
        "Prefix-Digest": version.digest,
    }


def _repr_digest(sha256: bytes) -> str:
    return f"sha-256=:{base64.b64encode(sha256).decode()}:"


async def _each(chunks: Iterable[memoryview]) -> Chunks:
    for chunk in chunks:
        yield chunk


async def _read(file: BinaryIO, count: int) -> Chunks:
    while count > 0 and (chunk := await to_thread.run_sync(file.read, min(count, _CHUNK))):
        yield chunk
        count -= len(chunk)
