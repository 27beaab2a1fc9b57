"""Request bodies, read under limits while they arrive. JSON is parsed and validated in threads, in memory that was
reserved before.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any, Final, TypeVar

from fastapi import Request
from pydantic import BaseModel
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect

from prefix_service.api.dependencies.memory import computed, reserved
from prefix_service.api.http.json_objects import MOST_JSON, MOST_MASK_JSON, json_object, validated
from prefix_service.api.http.patience import MINIMUM_RATE, Patience
from prefix_service.api.middleware.auth import PUBLIC
from prefix_service.api.state import state_of
from prefix_service.errors import InvalidRequest, RequestTimeout, TooLarge
from prefix_service.prefix.json_text import json_memory

_OTHER_CONTAINERS: Final = 64  # lists and objects that are neither a row nor a row of a mask

M = TypeVar("M", bound=BaseModel)
T = TypeVar("T")


def has_body(headers: Headers) -> bool:
    """Returns whether a request carries a body according to its headers."""
    return headers.get("content-length", "0") != "0" or "transfer-encoding" in headers


def declared_bytes(request: Request, limit: int | None = None) -> int:
    """Returns the body's Content-Length, but at most `limit`; without a Content-Length `limit`, or 0 if there is no
    limit."""
    declared = request.headers.get("content-length", "")
    if not declared.isdecimal() or len(declared) > 19:
        return limit or 0
    return int(declared) if limit is None else min(int(declared), limit)


async def read_body(request: Request, limit: int) -> bytearray:
    """Returns the whole body. A key that ended while it arrived is refused; changes prove theirs again as they write.

    Raises:
        Unauthenticated: the key or the session has ended meanwhile.
        TooLarge: it has more than `limit` bytes, declared or not.
        RequestTimeout: it did not arrive within `receive_timeout` seconds, however steadily it came.
        InvalidRequest: the caller went away.
    """
    body = bytearray()
    async for piece in arriving(request, limit, extends=False):
        body += piece
    if request.scope["path"] not in PUBLIC:
        await state_of(request).authenticator.admit(request.scope)
    return body


async def arriving(request: Request, limit: int, *, extends: bool) -> AsyncIterator[bytes]:
    """Yields a body, piece by piece. It has `receive_timeout` seconds to arrive; with `extends`, bytes that arrive
    extend them.

    Raises:
        TooLarge: it has more than `limit` bytes, declared or not.
        RequestTimeout: it did not arrive in time.
        InvalidRequest: the caller went away.
    """
    if (declared := declared_bytes(request)) > limit:
        raise TooLarge(f"the body has {declared} bytes, more than {limit}")
    settings = state_of(request).settings
    patience = Patience(settings.receive_timeout)
    clock = asyncio.get_running_loop().time
    stream, received = request.stream(), 0
    while True:
        began = clock()
        try:
            async with asyncio.timeout(patience.left):
                piece = await anext(stream, None)
        except TimeoutError as error:
            slow = f"stopped after {received} bytes, or brings less than {MINIMUM_RATE} a second"
            late = f"is not whole after {settings.receive_timeout:g} seconds, {received} bytes have arrived"
            raise RequestTimeout(f"the body {slow if extends else late}: send it again") from error
        except ClientDisconnect as error:
            raise InvalidRequest("the connection ended before the body did") from error
        if piece is None:
            return
        received += len(piece)
        if received > limit:
            raise TooLarge(f"the body has more than {limit} bytes")
        patience.spend(clock() - began, len(piece) if extends else 0)
        yield piece


async def read_json(request: Request, read: Callable[[dict[str, Any]], T]) -> T:
    """Returns what `read` makes of the JSON object in a body.

    Raises:
        InvalidRequest: it is not JSON, or what `read` raises.
        TooLarge: it has more than a megabyte.
        OutOfSpace, Overloaded: there is no memory for it.
    """
    limit = min(MOST_JSON, state_of(request).settings.max_request_bytes)
    async with reserved(request, declared_bytes(request, limit)):
        return await parsed(request, await read_body(request, limit), read)


async def parsed(request: Request, body: bytearray, read: Callable[[dict[str, Any]], T]) -> T:
    """Returns what `read` makes of a JSON object.

    Raises:
        InvalidRequest: it is not JSON, or what `read` raises.
        OutOfSpace, Overloaded: there is no memory for it.
    """
    return await computed(request, json_memory(len(body)), lambda: read(json_object(body)))


async def read_mask_json(request: Request, read: Callable[[dict[str, Any]], T]) -> T:
    """Returns what `read` makes of the JSON object, with a mask, in a body whose memory is reserved.

    Raises:
        InvalidRequest: it is not JSON, has more lists than a batch can need, or what `read` raises.
        TooLarge: it has more than four megabytes.
        OutOfSpace, Overloaded: there is no memory for it.
    """
    settings = state_of(request).settings
    limit = min(MOST_MASK_JSON, settings.max_request_bytes)
    try:
        body = await read_body(request, limit)
    except TooLarge as error:
        raise TooLarge(f"{error.message} of JSON: send a larger mask to …/prefix as a safetensors file") from error
    # Python's lock is held while lists are parsed: 40 ms for 65,536. Each row is one at most, and each row of a mask.
    containers, rows = body.count(b"[") + body.count(b"{"), settings.max_batch_size
    if containers > 2 * rows + _OTHER_CONTAINERS:
        raise InvalidRequest(
            f"the body has {containers} lists and objects, too many for a batch of {rows} rows, the largest here: ask "
            "for fewer rows"
        )
    return await parsed(request, body, read)


async def read_model(request: Request, model: type[M]) -> M:
    """Returns a JSON body as its model.

    Raises:
        InvalidRequest: it is not JSON, or a field is missing, unknown or malformed.
        TooLarge: it has more than a megabyte.
        OutOfSpace, Overloaded: there is no memory for it.
    """
    return await read_json(request, partial(validated, model))
