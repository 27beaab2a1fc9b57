"""TCP relays whose connections can be cut half-open."""

import asyncio
import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Final

_PIECE: Final = 1 << 16


class Relay:
    """Passes the connections to one port of this machine on to another one, where nobody needs to listen yet."""

    def __init__(self, port: int, target: int) -> None:
        self.port, self._target = port, target
        self._cuts = 0
        # Python would collect those that are cut as garbage, and close them.
        self._connections: set[asyncio.Task[None] | None] = set()

    def cut(self) -> None:
        """Loses all further bytes of the connections that are open now, whose ends are not told. New ones work."""
        self._cuts += 1

    async def listen(self) -> asyncio.Server:
        """Begins to relay."""
        return await asyncio.start_server(self._relay, "127.0.0.1", self.port)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        cuts, writers = self._cuts, [writer]
        self._connections.add(asyncio.current_task())
        try:
            answers, requests = await asyncio.open_connection("127.0.0.1", self._target)
            writers.append(requests)
            await asyncio.gather(self._pump(reader, requests, cuts), self._pump(answers, writer, cuts))
            for each in writers:
                each.close()
        except (OSError, asyncio.CancelledError):  # asyncio would report the second as an error
            for each in writers:
                each.transport.abort()
        self._connections.discard(asyncio.current_task())

    async def _pump(self, source: asyncio.StreamReader, target: asyncio.StreamWriter, cuts: int) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(_PIECE):
                if cuts == self._cuts:
                    target.write(data)
                    await target.drain()
        if cuts == self._cuts:
            target.close()


@contextlib.contextmanager
def relaying(relays: Sequence[Relay]) -> Iterator[None]:
    """Runs relays in a thread while the block runs."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="relays", daemon=True)
    thread.start()
    servers = [asyncio.run_coroutine_threadsafe(relay.listen(), loop).result(30) for relay in relays]
    try:
        yield
    finally:
        asyncio.run_coroutine_threadsafe(_end(servers), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(30)
        loop.close()


async def _end(servers: Sequence[asyncio.Server]) -> None:
    for server in servers:
        server.close()
    while connections := asyncio.all_tasks() - {asyncio.current_task()}:
        for connection in connections:
            connection.cancel()
        await asyncio.wait(connections)
