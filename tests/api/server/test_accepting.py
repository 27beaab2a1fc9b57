"""The server accepts connections a few at a time."""

import asyncio
import contextlib
import itertools
import socket

import pytest

from prefix_service.api.server.accepting import Acceptor

COUNT = 60


class _Noted(asyncio.Protocol):
    def __init__(self, made: "asyncio.Queue[asyncio.BaseTransport]") -> None:
        self._made = made

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._made.put_nowait(transport)


async def _crowd(listening: socket.socket, stack: contextlib.ExitStack) -> None:
    for _ in range(COUNT):
        connection = stack.enter_context(socket.socket())
        connection.setblocking(False)
        connection.connect_ex(listening.getsockname())


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_a_crowd_is_accepted_in_small_turns(loop: str) -> None:
    async def run() -> None:
        made: asyncio.Queue[asyncio.BaseTransport] = asyncio.Queue()
        with socket.create_server(("127.0.0.1", 0), backlog=COUNT) as listening, contextlib.ExitStack() as stack:
            await _crowd(listening, stack)
            acceptor = Acceptor([listening], lambda: _Noted(made))
            counts = [0]
            async with asyncio.timeout(60):
                while made.qsize() < COUNT:
                    await asyncio.sleep(0)
                    counts.append(made.qsize())
            assert max(after - before for before, after in itertools.pairwise(counts)) <= 4
            await acceptor.close()
            await _crowd(listening, stack)
            await asyncio.sleep(0.05)
            assert made.qsize() == COUNT
            while not made.empty():
                made.get_nowait().close()

    factory = pytest.importorskip("uvloop").new_event_loop if loop == "uvloop" else None
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(run())


def test_without_descriptors_it_waits_and_then_accepts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prefix_service.api.server.accepting._PAUSE", 0.1)

    async def run() -> None:
        made: asyncio.Queue[asyncio.BaseTransport] = asyncio.Queue()
        with _Full(("127.0.0.1", 0)) as listening, socket.socket() as client:
            acceptor = Acceptor([listening], lambda: _Noted(made))
            client.setblocking(False)
            client.connect_ex(listening.getsockname())
            transport = await asyncio.wait_for(made.get(), 60)
            assert listening.refused == 1  # not at once again: the descriptor stays readable
            await acceptor.close()
            transport.close()

    asyncio.run(run())


class _Full(socket.socket):
    """A socket that has no descriptor for the first connection that it accepts."""

    refused = 0

    def __init__(self, address: tuple[str, int]) -> None:
        super().__init__()
        self.bind(address)
        self.listen()

    def accept(self) -> tuple[socket.socket, object]:
        if not self.refused:
            self.refused += 1
            raise OSError(24, "Too many open files")
        return super().accept()
