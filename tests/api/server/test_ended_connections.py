"""References alone free the memory of a connection that ended.

A collection of garbage stops the event loop while it frees what refers to itself: 800 connections with half a body took
60 ms, as often as they came again.
"""

import asyncio
import contextlib
import gc
import json
import socket
import struct
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final, Literal

import pytest

from prefix_service.api.app import create_app
from prefix_service.api.server.connections import Guarded
from prefix_service.api.server.serving import Server
from prefix_service.data_folder.opening import opened
from prefix_service.settings import Settings
from tests.api.framing.conftest import PARSERS
from tests.api.helpers import CONFIG, head, versions_path

COUNT: Final = 3  # connections of each kind
ADAPTER: Final = json.dumps({"config": CONFIG, "seed": 1}).encode()
LIVE: Final = head("GET", "/livez")
PUBLISH: Final = {"Content_Type": "application/json", "Content_Length": "1000"}
VERSIONS: Final = versions_path("t", "b")
RESET: Final = struct.pack("ii", 1, 0)  # of SO_LINGER: on, 0 seconds

ASKED: Final = {
    "a page": LIVE,
    "several at a time": LIVE * 5,
    "a prefix": head("GET", "/v1/tenants/t/adapters/a/prefix"),
    "no such path": head("GET", "/none"),
    "HTTP/1.0": LIVE.replace(b"HTTP/1.1", b"HTTP/1.0"),
    "the last request": head("GET", "/livez", Connection="close"),
    "no HTTP": b"GET / HTTP/7\r\n\r\n",
    "a body on demand": head("POST", VERSIONS, Expect="100-continue", **PUBLISH),
    "a body that is refused early": head("POST", "/livez", **PUBLISH) + b"{",
}
"""What a connection sends that then reads an answer."""
UNANSWERED: Final = {
    "nothing": b"",
    "part of a head": LIVE[:-4],
    "part of a body": head("POST", VERSIONS, **PUBLISH) + b"{",
    "part of a body, and more": head("POST", VERSIONS, **PUBLISH) + b"{" + b" " * 999 + LIVE * 5,
}
"""What a connection sends that then ends."""


@contextlib.asynccontextmanager
async def service(folder: Path, parser: Literal["httptools", "h11"]) -> AsyncIterator[int]:
    """Yields the port of a whole service in this process, which has an adapter."""
    settings = Settings(data_dir=folder, dev=True, parser=parser)
    with opened(settings), socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)
        server = Server(settings, create_app(settings), lambda: None, lambda: None)
        serving = asyncio.create_task(server.serve([listening]))
        while not server.started:  # uvicorn offers no event
            assert not serving.done()
            await asyncio.sleep(0.01)
        yield listening.getsockname()[1]
        server.should_exit = True
        await serving


async def converse(port: int, sent: bytes, *, answered: bool, reset: bool) -> None:
    """Opens a connection, sends something, reads the start of an answer if one is expected, and ends the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(sent)
    await writer.drain()
    if answered:
        assert await asyncio.wait_for(reader.read(100), 60)
    else:
        await asyncio.sleep(0.02)
    if reset:
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        writer.transport.abort()
    else:
        writer.close()


def kept() -> list[Any]:
    """Returns the connections, and the requests of connections, that this process has in memory."""
    kinds = [type(one) for one in gc.get_objects()]
    return [kind for kind in kinds if issubclass(kind, Guarded) or kind.__name__ == "RequestResponseCycle"]


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("parser", PARSERS)
def test_no_connection_waits_for_a_collection(tmp_path: Path, parser: Any, loop: str) -> None:
    """Nothing of a connection is left after its end, however it ended, although nothing is collected."""

    async def run() -> dict[str, int]:
        left = {}
        async with service(tmp_path, parser) as port:
            fields = {"Content_Type": "application/json", "Content_Length": str(len(ADAPTER))}
            await converse(port, head("POST", versions_path("t", "a"), **fields) + ADAPTER, answered=True, reset=False)
            for name, sent in (ASKED | UNANSWERED).items():
                for reset in (False, True):
                    gc.collect()
                    gc.disable()
                    before = len(kept())
                    for _ in range(COUNT):
                        await converse(port, sent, answered=name in ASKED, reset=reset)
                    until = time.monotonic() + 30
                    while (more := len(kept()) - before) > 0 and time.monotonic() < until:  # noqa: ASYNC110  # no event
                        await asyncio.sleep(0.05)
                    if more > 0:
                        left[f"{name}, {'reset' if reset else 'closed'}"] = more
                    gc.enable()
        return left

    factory = pytest.importorskip("uvloop").new_event_loop if loop == "uvloop" else None
    switch = sys.getswitchinterval()
    try:
        with asyncio.Runner(loop_factory=factory) as runner:
            assert runner.run(run()) == {}
    finally:  # the service prepares a process of its own, and this one runs other tests too
        gc.enable()
        gc.unfreeze()
        sys.setswitchinterval(switch)
