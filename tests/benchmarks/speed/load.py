"""Clients that cost little: raw sockets that read into one buffer, used again, and count what arrives."""

import random
import select
import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final, Self

Address = tuple[str, int]
Framing = Callable[[bytearray, int], tuple[int, int]]
"""Returns the status of an answer and its length in bytes, head included, from a buffer's first bytes."""

_BUFFER: Final = 1 << 20


def get(path: str, address: Address, **fields: str) -> bytes:
    """Returns a request as it travels; `if_none_match` becomes `If-None-Match`."""
    lines = [f"GET {path} HTTP/1.1", f"Host: {address[0]}:{address[1]}", "Accept-Encoding: identity"]
    lines += [f"{name.replace('_', '-').title()}: {value}" for name, value in fields.items()]
    return "\r\n".join([*lines, "", ""]).encode()


def http(buffer: bytearray, count: int) -> tuple[int, int]:
    """Returns status and length of an HTTP/1.1 answer with a Content-Length."""
    end = buffer.find(b"\r\n\r\n", 0, count) + 4
    if end < 4:
        raise RuntimeError(f"the head of an answer came in pieces: {bytes(buffer[:count])!r:.200}")
    status = int(buffer[9:12])
    if status == 304:
        return status, end
    head = bytes(buffer[:end]).lower()
    at = head.index(b"\r\ncontent-length:") + 17
    return status, end + int(head[at : head.index(b"\r\n", at)])


def redis(buffer: bytearray, count: int) -> tuple[int, int]:
    """Returns status and length of a bulk string of Redis; 200 stands for a key that exists."""
    end = buffer.find(b"\r\n", 0, count) + 2
    length = int(buffer[1:end])
    return (200, end + length + 2) if length >= 0 else (404, end)


class Reader:
    """A connection that is kept, with one request at a time."""

    def __init__(self, address: Address, framing: Framing = http) -> None:
        self._socket = _connected(address)
        self._framing = framing
        self._buffer = bytearray(_BUFFER)
        self._view = memoryview(self._buffer)

    def read(self, request: bytes, status: int = 200, pause: Callable[[], None] | None = None) -> int:
        """Sends a request and reads the answer, which must have this status; returns its length. `pause` is called
        between reads, which are then of 64 KiB.
        """
        self._socket.sendall(request)
        view = self._view if pause is None else self._view[: 1 << 16]
        count = self._socket.recv_into(view)
        found, length = self._framing(self._buffer, count)
        if found != status:
            raise RuntimeError(f"{request!r:.200}: {bytes(self._buffer[:count])!r:.400}")
        left = length - count
        while left:
            if pause is not None:
                pause()
            count = self._socket.recv_into(view, min(left, len(view)))
            if not count:
                raise RuntimeError(f"{request!r:.200}: the connection ended {left} bytes early")
            left -= count
        return length

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._socket.close()


@dataclass(slots=True)
class Load:
    """The results of a load: latencies in seconds, answers by status, bytes, and how long it took."""

    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    nbytes: int = 0

    @property
    def rate(self) -> float:
        """Returns the answers a second."""
        return len(self.latencies) / self.seconds


class _Lane:
    """A connection and the answer that it waits for; `left` is None until the answer's head is there."""

    def __init__(self, address: Address) -> None:
        self.socket = _connected(address)
        self.began = 0.0
        self.left: int | None = None

    def send(self, request: bytes, began: float) -> None:
        self.began, self.left = began, None
        self.socket.sendall(request)

    def receive(self, buffer: bytearray, load: Load) -> bool:
        """Reads what has arrived, and returns whether the answer is whole."""
        if self.left is None:
            count = self.socket.recv_into(buffer)
            status, length = http(buffer, count)
            load.statuses[status] += 1
            load.nbytes += length
            self.left = length - count
        else:
            count = self.socket.recv_into(buffer, min(self.left, len(buffer)))
            self.left -= count
        if not count:
            raise RuntimeError("the connection ended in the middle of an answer")
        return self.left == 0


class _Lanes:
    """Connections that one thread reads, whichever is ready."""

    def __init__(self, address: Address, count: int) -> None:
        self.all = [_Lane(address) for _ in range(count)]
        self._by_number = {lane.socket.fileno(): lane for lane in self.all}
        self._poll = select.epoll()
        for number in self._by_number:
            self._poll.register(number, select.EPOLLIN)
        self._buffer = bytearray(_BUFFER)

    def done(self, load: Load, wait: float) -> Iterator[_Lane]:
        """Yields the connections whose answer became whole, of those that are ready within `wait` seconds."""
        for number, _ in self._poll.poll(wait):
            lane = self._by_number[number]
            if lane.receive(self._buffer, load):
                load.latencies.append(time.perf_counter() - lane.began)
                yield lane

    def used(self, request: bytes) -> list[_Lane]:
        """Returns all connections after a first answer each, which is not counted."""
        free: list[_Lane] = []
        for lane in self.all:
            lane.send(request, time.perf_counter())
        while len(free) < len(self.all):
            free.extend(self.done(Load(), 10))
        return free

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._poll.close()
        for lane in self.all:
            lane.socket.close()


def closed_loop(address: Address, requests: Iterator[bytes], connections: int, seconds: float) -> Load:
    """Sends the next request on each connection when its answer is there, until the time is over."""
    load = Load()
    with _Lanes(address, connections) as lanes:
        began = time.perf_counter()
        for lane in lanes.all:
            lane.send(next(requests), time.perf_counter())
        under_way = connections
        while under_way:
            for lane in lanes.done(load, 10):
                now = time.perf_counter()
                if now - began < seconds:
                    lane.send(next(requests), now)
                else:
                    under_way -= 1
        load.seconds = time.perf_counter() - began
    return load


def open_loop(address: Address, requests: Iterator[bytes], connections: int, seconds: float, rate: float) -> Load:
    """Sends requests that fall due at random, `rate` a second (Poisson), whatever the answers do. A latency counts from
    the due time, so that the wait for a free connection is part of it. Never sleeps: a timer would be coarser than an
    answer.
    """
    load = Load()
    draw = random.Random(0)  # noqa: S311 - a benchmark's draw
    waiting: deque[float] = deque()
    with _Lanes(address, connections) as lanes:
        free = lanes.used(next(requests))
        began = time.perf_counter()
        due = began + draw.expovariate(rate)
        while due < began + seconds or waiting or len(free) < connections:
            now = time.perf_counter()
            while due <= now and due < began + seconds:
                waiting.append(due)
                due += draw.expovariate(rate)
            while waiting and free:
                free.pop().send(next(requests), waiting.popleft())
            free.extend(lanes.done(load, 0))
        load.seconds = time.perf_counter() - began
    return load


def _connected(address: Address) -> socket.socket:
    connection = socket.create_connection(address, timeout=60)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection
