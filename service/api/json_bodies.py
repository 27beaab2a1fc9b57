"""JSON in request bodies: bounded before it is parsed, parsed and validated in threads, memory reserved before that."""

import contextlib
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any, Final, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError

from service.api.bodies import read_body
from service.api.problems import invalid_request
from service.api.state import state_of
from service.errors import InvalidConfig, InvalidRequest, TooLarge
from service.prefix.config import parse_json

MOST_JSON: Final = 1 << 20
"""Bytes of JSON without masks."""

MOST_MASK_JSON: Final = 4 << 20
"""Bytes of JSON with a mask."""

MOST_VALUES: Final = 1 << 20
"""Values that a mask may have as JSON."""

_MOST_CONTAINERS: Final = 1 << 17  # lists and objects
_MOST_NAMES: Final = 1 << 16
"""Names of members, at most as many as colons. `json.loads` holds Python's lock: within all these bounds for 90 ms at
most, of 4 MiB of numbers with 4,300 digits each; 420,000 names took 240 ms."""

_MEMORY: Final = 40
"""Bytes of memory that a byte of JSON may take while it is parsed: measured are 36, of lists in lists."""

_PLATFORM: Final = "(the platform)"  # no tenant's name has a space

M = TypeVar("M", bound=BaseModel)
T = TypeVar("T")


def payer(request: Request) -> str:
    """Returns the tenant that a request's work is charged to; of a key of the platform, a name that no tenant has."""
    tenant: str | None = request.scope["tenant"]
    return _PLATFORM if tenant is None else tenant


def declared_bytes(request: Request, limit: int) -> int:
    """Returns the size of a body as its header tells, or else the most that it may have."""
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
    return await computed(request, _MEMORY * len(body), lambda: read(json_object(body)))


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


def json_memory(nbytes: int) -> int:
    """Returns the bytes of memory that parsing takes."""
    return _MEMORY * min(nbytes, MOST_MASK_JSON)


def json_object(body: bytes | bytearray) -> dict[str, Any]:
    """Returns the JSON object that a body is. Blocking.

    Raises:
        InvalidRequest: it is not one, or it has too many values.
    """
    containers = body.count(b"[") + body.count(b"{")
    values = containers + body.count(b",")
    if values > MOST_VALUES + _MOST_CONTAINERS or containers > _MOST_CONTAINERS:
        raise InvalidRequest(
            f"the body has about {values} values, {containers} of them lists and objects, and at most {MOST_VALUES} "
            f"and {_MOST_CONTAINERS} are read"
        )
    if (names := body.count(b":")) > _MOST_NAMES:
        raise InvalidRequest(f"the body has {names} colons, and at most {_MOST_NAMES} are read: it names too much")
    try:
        return parse_json(bytes(body), "the body", len(body))
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
