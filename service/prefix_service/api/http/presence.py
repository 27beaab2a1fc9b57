"""Cancels work whose client has left."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

T = TypeVar("T")


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T | None:
    """Returns the result of `work`; cancels it and returns None once the client has closed the connection.

    The work is done by the caller's own task: thousands of streams wait here, and a task more for each takes memory.
    """
    task, is_over, has_left = asyncio.current_task(), False, False
    assert task is not None  # noqa: S101 - this is a coroutine
    before = task.cancelling()

    def cancel(leaving: asyncio.Task[None]) -> None:
        nonlocal has_left
        if not is_over and not leaving.cancelled():
            has_left = True
            task.cancel()

    leaving = asyncio.create_task(_left(receive))
    leaving.add_done_callback(cancel)
    try:
        return await work
    except asyncio.CancelledError:
        if has_left and task.uncancel() <= before:
            return None
        raise
    finally:
        is_over = True
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
