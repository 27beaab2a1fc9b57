"""`while_connected`: whose work ends, and who goes on, once a client has left."""

import asyncio

import pytest
from starlette.types import Message

from prefix_service.api.http.presence import while_connected

pytestmark = pytest.mark.anyio


class Client:
    """Sends its body, and leaves when it is told to."""

    def __init__(self) -> None:
        self.leaves = asyncio.Event()
        self._messages: list[Message] = [{"type": "http.request"}]

    async def receive(self) -> Message:
        if self._messages:
            return self._messages.pop()
        await self.leaves.wait()
        return {"type": "http.disconnect"}


async def test_work_ends_when_its_client_leaves() -> None:
    """The caller goes on, and is not cancelled itself."""
    client, is_cancelled = Client(), False

    async def work() -> str:
        nonlocal is_cancelled
        client.leaves.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            is_cancelled = True
            raise
        return "done"

    assert await while_connected(client.receive, work()) is None
    assert is_cancelled
    await asyncio.sleep(0)


async def test_a_client_that_leaves_at_the_end_cancels_nothing() -> None:
    """Work that was done in the moment that its client left has its result, and nobody is cancelled later."""
    client = Client()

    async def work() -> str:
        await asyncio.sleep(0)  # the client is waited for now
        client.leaves.set()
        return "done"

    assert await while_connected(client.receive, work()) == "done"
    for _ in range(5):
        await asyncio.sleep(0)


async def test_who_cancels_the_caller_cancels_it() -> None:
    """It is not taken for a client that left."""
    client = Client()
    caller = asyncio.create_task(while_connected(client.receive, asyncio.sleep(60)))
    await asyncio.sleep(0)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller


async def test_errors_of_the_work_are_raised() -> None:
    """They are the caller's, as without a client."""

    async def work() -> None:
        raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        await while_connected(Client().receive, work())
