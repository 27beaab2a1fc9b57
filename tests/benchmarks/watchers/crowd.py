"""Watchers of a service that wait in processes of their own, each from an address of its own."""

import asyncio
import contextlib
import multiprocessing
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Final

PROCESSES: Final = 4
_TOGETHER: Final = 50  # connections that one process opens at a time


def _address(number: int) -> str:
    """Returns an address of this machine for a watcher: one of 127.1.0.1 to 127.254.254.254."""
    return f"127.{1 + number // 254 // 254}.{1 + number // 254 % 254}.{1 + number % 254}"


@contextlib.contextmanager
def crowd(port: int, keys: Sequence[str], count: int) -> Iterator[list[Connection]]:
    """Yields when `count` watchers follow the changes, with the keys in turn, and lets them go when the block ends.

    Each of the connections is one process, which sends the number of events that its watchers have received when it is
    sent anything.

    Raises:
        RuntimeError: a watcher was refused.
    """
    context = multiprocessing.get_context("spawn")
    processes: list[SpawnProcess] = []
    mine: list[Connection] = []
    for number in range(PROCESSES):
        one, other = context.Pipe()
        arguments = (other, port, list(keys), range(number, count, PROCESSES))
        process = context.Process(target=_wait_in, args=arguments, daemon=True)
        process.start()
        other.close()
        processes.append(process)
        mine.append(one)
    try:
        for one in mine:
            if failure := one.recv():
                raise RuntimeError(failure)
        yield mine
    finally:
        for process in processes:
            process.kill()
            process.join()


def _wait_in(connection: Connection, port: int, keys: list[str], numbers: range) -> None:
    asyncio.run(_Crowd(connection, port, keys).wait(numbers))


class _Crowd:
    def __init__(self, connection: Connection, port: int, keys: list[str]) -> None:
        self._connection, self._port, self._keys = connection, port, keys
        self._turn = asyncio.Semaphore(_TOGETHER)
        self._events = 0
        self._readers: list[asyncio.Task[None]] = []

    async def wait(self, numbers: range) -> None:
        """Opens all, and answers until the process is killed."""
        try:
            await asyncio.gather(*map(self._open, numbers))
        except Exception as error:  # noqa: BLE001 - the parent raises it
            self._connection.send(f"a watcher was refused: {error!r}")
            return
        self._connection.send("")
        while True:
            await asyncio.to_thread(self._connection.recv)
            self._connection.send(self._events)

    async def _open(self, number: int) -> None:
        key = self._keys[number % len(self._keys)]
        request = f"GET /v1/changes HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {key}\r\n"
        async with self._turn:
            reader, writer = await asyncio.open_connection("127.0.0.1", self._port, local_addr=(_address(number), 0))
            writer.write(f"{request}Accept: text/event-stream\r\n\r\n".encode())
            head = await reader.readuntil(b"\r\n\r\n")
            if b" 200 " not in head.partition(b"\r\n")[0]:
                raise RuntimeError(head + await reader.read(1000))
            await reader.readuntil(b"id: ")
        self._readers.append(asyncio.create_task(self._read(reader, writer)))

    async def _read(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            self._events += data.count(b"data: ")
        writer.close()
