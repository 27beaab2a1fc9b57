"""A prefix for a worker on the same host: the name of the file that it may map."""

from functools import partial
from typing import Final

import orjson
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from prefix_service.api.http.negotiation import is_current, wanted_digest
from prefix_service.api.http.responses import Fields, PrefixResponse, body_digest
from prefix_service.api.http.served import note_load
from prefix_service.library.library import Library
from prefix_service.library.plan import Plan
from prefix_service.prefix.variant import SHARED_FILE_TYPE
from prefix_service.prefix.wire.digests import format_digest
from prefix_service.settings import Settings

_COMMON: Final[Fields] = [
    (b"content-type", SHARED_FILE_TYPE.encode()),
    (b"x-content-type-options", b"nosniff"),
]


def shares_file(request: Request, settings: Settings, plan: Plan) -> bool:
    """Whether the answer may be a file's name: renderings lie in files, the file is this very message, and the caller
    is on the Unix socket, where nobody has an address."""
    return settings.shared_dir is not None and request.client is None and plan.file.is_canonical


class SharedFileResponse(PrefixResponse):
    """Names the file of a planned prefix; where it has none, answers as `PrefixResponse`.

    Its entity tag is weak: after an eviction another file, with another name, holds the same. A caller that has the
    bytes keeps them: their tag is current too.
    """

    def __init__(self, library: Library, plan: Plan, *, immutable: bool, varies: bool) -> None:
        super().__init__(library, plan, immutable=immutable, varies=varies)
        self._tag = f'{plan.etag[:-1]}-file"'
        kept = [field for field in self._entity_fields if field[0] != b"etag"]
        self._file_fields: Fields = [*kept, (b"etag", f"W/{self._tag}".encode())]

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Headers(raw=scope["headers"])
        if is_current(request, self._tag):
            await send({"type": "http.response.start", "status": 304, "headers": self._file_fields})
            await send({"type": "http.response.body"})
            return
        if is_current(request, self._etag):
            await super()._answer(scope, receive, send)
            return
        algorithm = wanted_digest(request)
        async with self._library.rendering(self._plan, algorithm, partial(note_load, scope)) as rendering:
            if rendering.file is None:
                await super()._answer(scope, receive, send)
                return
            told: dict[str, str | int] = {"file": rendering.file, "bytes": self._length}
            if algorithm is not None:
                digest = await body_digest(self._library, self._plan, rendering, algorithm, receive)
                told |= {} if digest is None else {"repr_digest": format_digest(algorithm, digest)}
            body = orjson.dumps(told)
            fields = [*self._file_fields, *_COMMON, (b"content-length", b"%d" % len(body))]
            await send({"type": "http.response.start", "status": 200, "headers": fields})
            await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})
