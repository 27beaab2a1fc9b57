"""The memory and the turn of a request's work, charged to its tenant."""

import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

from fastapi import Depends, Request

from prefix_service.api.state import state_of
from prefix_service.registry.admission import PLATFORM

T = TypeVar("T")


def payer(request: Request) -> str:
    """Returns the tenant that a request's work is charged to; of a key of the platform, a name that no tenant has."""
    tenant: str | None = request.scope["tenant"]
    return PLATFORM if tenant is None else tenant


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
