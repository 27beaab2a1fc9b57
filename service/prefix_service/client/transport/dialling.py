"""TCP connections to a name with several addresses (RFC 8305, "Happy Eyeballs").

Each address is tried a moment after the previous one, or as soon as that one fails. The first connection wins.
"""

import errno
import os
import select
import socket
import threading
import time
from collections import deque
from itertools import chain, zip_longest
from queue import Empty, SimpleQueue
from typing import Any, Final

from prefix_service.system.forks import close_in_child

_HEAD_START: Final = 0.25
"""Seconds between the starts of two attempts, as RFC 8305 recommends."""

_LONGEST_WAIT: Final = 1_000_000.0  # seconds; poll(2) allows 2,147,483

Address = tuple[Any, ...]
"""The type of one address that `socket.getaddrinfo` returns."""


def connect(host: bytes, port: int, until: float) -> socket.socket:
    """Returns a new non-blocking connection, made before the time `until` of `time.monotonic`.

    Raises:
        OSError: no address could be reached; TimeoutError if none answered in time.
    """
    addresses = _interleaved(resolved(host, port, until))
    race = _Race(min(_HEAD_START, time_left(until) / (2 * len(addresses))))
    try:
        return race.winner(deque(addresses), until)
    finally:
        race.end()


def time_left(until: float) -> float:
    """Returns the seconds until a time of `time.monotonic`, at most 1,000,000, because system calls have limits.

    Raises:
        TimeoutError: the time has passed.
    """
    left = until - time.monotonic()
    if left <= 0:
        raise TimeoutError("timed out")
    return min(left, _LONGEST_WAIT)


class _Race:
    """Connection attempts that run in parallel."""

    def __init__(self, head_start: float) -> None:
        self._head_start = head_start
        self._poll = select.poll()
        self._running: dict[int, socket.socket] = {}
        self._failed = OSError("there is no address")

    def winner(self, waiting: deque[Address], until: float) -> socket.socket:
        """Returns the first socket that is connected.

        Raises:
            OSError: all attempts failed; TimeoutError if none succeeded in time.
        """
        next_start = 0.0
        while waiting or self._running:
            if waiting and time.monotonic() >= next_start:
                next_start = time.monotonic() + self._head_start if self._start(waiting.popleft()) else 0.0
                continue
            left = time_left(until)
            events = self._poll.poll(1000 * (min(left, max(next_start - time.monotonic(), 0)) if waiting else left))
            for number, _ in events:
                found = self._running.pop(number)
                self._poll.unregister(number)
                if self._is_connected(found):
                    return found
                next_start = 0.0
        raise self._failed

    def _start(self, address: Address) -> bool:
        """Starts an attempt; returns whether it has begun."""
        family, kind, protocol, _, where = address
        try:
            begun = socket.socket(family, kind, protocol)
        except OSError as error:  # a machine without IPv6
            self._failed = error
            return False
        close_in_child(begun)
        begun.setblocking(False)
        code = begun.connect_ex(where)
        if code not in (0, errno.EINPROGRESS):
            self._fail(begun, code)
            return False
        self._running[begun.fileno()] = begun
        self._poll.register(begun, select.POLLOUT)
        return True

    def _is_connected(self, found: socket.socket) -> bool:
        code = found.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            self._fail(found, code)
            return False
        found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return True

    def _fail(self, attempt: socket.socket, code: int) -> None:
        attempt.close()
        self._failed = OSError(code, os.strerror(code))

    def end(self) -> None:
        """Closes the attempts that did not win."""
        for attempt in self._running.values():
            attempt.close()


def is_numeric(host: bytes) -> bool:
    """Returns whether a host is an IP address, and no name."""
    try:
        socket.getaddrinfo(host, None, flags=socket.AI_NUMERICHOST)
    except socket.gaierror:
        return False
    return True


def several(addresses: list[Address]) -> list[str]:
    """Returns the addresses of a service at several, in the order of their text: those of one family, since one machine
    may have an address of each; none if no family has two."""
    for family in dict.fromkeys(address[0] for address in addresses):
        found = sorted({str(address[4][0]) for address in addresses if address[0] == family})
        if len(found) > 1:
            return found
    return []


def resolved(host: bytes, port: int, until: float) -> list[Address]:
    """Returns the addresses of a name.

    The resolver has no deadline, so it runs in a thread, which is left behind if it takes too long.
    """
    if is_numeric(host):
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    found: SimpleQueue[list[Address] | OSError] = SimpleQueue()

    def look_up() -> None:
        try:
            found.put(list(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)))
        except OSError as error:
            found.put(error)

    threading.Thread(target=look_up, name="prefix-resolver", daemon=True).start()
    try:
        addresses = found.get(timeout=time_left(until))
    except Empty:
        raise TimeoutError(f"the name {host.decode()} was not resolved in time") from None
    if isinstance(addresses, OSError):
        raise addresses
    return addresses


def _interleaved(addresses: list[Address]) -> list[Address]:
    """Returns the addresses in the resolver's order, but alternating between IPv6 and IPv4."""
    first = addresses[0][0]
    families = [a for a in addresses if a[0] == first], [a for a in addresses if a[0] != first]
    return [address for address in chain.from_iterable(zip_longest(*families)) if address is not None]
