"""Measures how others are delayed by an operation: how long the event loop is silent, and how long a writer waits."""

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import httpx

from tests.conftest import Server

_LIVEZ_EVERY: Final = 0.02
_WRITE_EVERY: Final = 0.05


@dataclass
class Noticed:
    """The longest times in seconds: between two answers of /livez, and of a change of another tenant."""

    seconds: float = 0.0
    silence: float = 0.0
    wait: float = 0.0


@contextmanager
def watched(server: Server) -> Iterator[Noticed]:
    """Asks and writes in threads until the block ends, after which the result is complete."""
    noticed, stop = Noticed(), threading.Event()
    livez, writer = server.client(""), server.client()
    counter = itertools.count(1)

    def ask() -> None:
        noticed.silence = max(noticed.silence, _timed(livez, lambda: livez.get("/livez")))

    def write() -> None:
        body = {"max_bytes": 10**9 + next(counter)}
        noticed.wait = max(noticed.wait, _timed(writer, lambda: writer.put("/v1/tenants/other", json=body)))

    def repeat(call: Callable[[], None], every: float) -> None:
        call()  # the block may end before a thread runs for the first time
        while not stop.wait(every):
            call()

    for call in (ask, write):
        call()
    noticed.silence = noticed.wait = 0.0
    threads = [threading.Thread(target=repeat, args=pair) for pair in ((ask, _LIVEZ_EVERY), (write, _WRITE_EVERY))]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    try:
        yield noticed
    finally:
        noticed.seconds = time.monotonic() - began
        stop.set()
        for thread in threads:
            thread.join()


def _timed(_client: httpx.Client, call: Callable[[], httpx.Response]) -> float:
    began = time.monotonic()
    while (answer := call()).status_code == 503:  # the wait goes on where one attempt took too long
        time.sleep(_WRITE_EVERY)
    answer.raise_for_status()
    return time.monotonic() - began
