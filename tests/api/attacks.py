"""Measurements for tests of attacks: a server's memory, and how long it is silent."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import httpx

from tests.api.helpers import peak_memory
from tests.conftest import Server

SILENCE: Final = 60.0
"""Seconds for which only an event loop that stands still is silent, on however slow a machine."""


@dataclass
class Harm:
    """The harm of an attack: bytes by which the server's peak memory grew, and the longest wait for `/livez` in
    seconds."""

    memory: int = 0
    silence: float = 0.0


@contextmanager
def harm(server: Server) -> Iterator[Harm]:
    """Yields an object that has the harm once the block has ended."""
    found, before, stop = Harm(), peak_memory(server), threading.Event()

    def ask() -> None:
        with httpx.Client() as client:
            while not stop.is_set():
                began = time.monotonic()
                assert client.get(f"{server.url}/livez", timeout=2 * SILENCE).status_code == 200
                found.silence = max(found.silence, time.monotonic() - began)
                stop.wait(0.01)

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        yield found
    finally:
        stop.set()
        asking.join()
        found.memory = peak_memory(server) - before
