"""JSON in request bodies: bounded before it is parsed, parsed and validated in threads, memory reserved before that."""

import contextlib
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any, Final, TypeVar

from fastapi import Depends, Request
from pydantic import BaseModel, ValidationError

from prefix_service.api.dependencies.bodies import read_body
from prefix_service.api.http.problems import invalid_request
from prefix_service.api.state import state_of
from prefix_service.errors import InvalidConfig, InvalidRequest, TooLarge
from prefix_service.prefix.json_text import json_memory, parse_json
from prefix_service.registry.admission import PLATFORM

MOST_JSON: Final = 1 << 20
"""Bytes of JSON without masks."""

MOST_MASK_JSON: Final = 4 << 20
"""Bytes of JSON with a mask."""

M = TypeVar("M", bound=BaseModel)
T = TypeVar("T")


def payer(request: Request) -> str:
    """Returns the tenant that a request's work is charged to; of a key of the platform, a name that no tenant has."""
    tenant: str | None = request.scope["tenant"]
    return PLATFORM if tenant is None else tenant


def declared_bytes(request: Request, limit: int) -> int:
    """Returns the body's Content-Length, but at most `limit`; `limit` if there is none."""
    declared = request.headers.get("content-length", "")
    return min(int(declared), limit) if declared.isdecimal() and len(declared) < 20 else limit


@contextlib.asynccontextmanager
async def reserved(request: Request, nbytes: int) -> AsyncIterator[None]:
    """Reserves memory for a body while the block runs.

    Raises:
        OutOfSpace, Overloaded: it cannot be had.
    """
    async with state_of(request).admission.work(payer(request), nbytes):
        yield


def held(nbytes: int) -> Any:
    """Returns a dependency that reserves memory for an answer until it has left."""

    async def hold(request: Request) -> AsyncIterator[None]:
        async with reserved(request, nbytes):
            yield

    return Depends(hold)


async def computed(request: Request, nbytes: int, call: Callable[[], T]) -> T:
    """Returns what `call` returns, in a thread, in its tenant's turn and with `nbytes` of memory reserved.

    Raises:
        OutOfSpace, Overloaded: the memory cannot be had.
    """
    async with state_of(request).admission.work(payer(request), nbytes) as work:
        return await work.run(call)


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
        InvalidRequest: it is not JSON, or what `read` raises.
        TooLarge: it has more than four megabytes.
        OutOfSpace, Overloaded: there is no memory for it.
    """
    limit = min(MOST_MASK_JSON, state_of(request).settings.max_request_bytes)
    try:
        body = await read_body(request, limit)
    except TooLarge as error:
        raise TooLarge(f"{error.message} of JSON: send a larger mask to …/prefix as a safetensors file") from error
    return await parsed(request, body, read)


async def read_model(request: Request, model: type[M]) -> M:
    """Returns a JSON body as its model.

    Raises:
        InvalidRequest: it is not JSON, or a field is missing, unknown or malformed.
        TooLarge: it has more than a megabyte.
        OutOfSpace, Overloaded: there is no memory for it.
    """
    return await read_json(request, partial(validated, model))


def json_object(body: bytes | bytearray, what: str = "the body") -> dict[str, Any]:
    """Returns the JSON object that a body is, or a part of it, which errors call `what`. Blocking.

    Raises:
        InvalidRequest: it is not one, or it has too many values or names.
    """
    try:
        return parse_json(bytes(body), what, len(body))
    except InvalidConfig as error:
        raise InvalidRequest(str(error)) from error


def validated(model: type[M], values: dict[str, Any]) -> M:
    """Returns a JSON object as its model.

    Raises:
        InvalidRequest: a field is missing, unknown or malformed.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise invalid_request(error.errors(include_url=False)) from error
