"""A server of one body, whole or in ranges, that sends no faster than a rate over each connection.

Clouds pace like this: EC2 gives one flow between two instances 5 Gbit/s, and all of them together many times that.
"""

import contextlib
import multiprocessing
import re
import socket
import threading
from collections.abc import Iterator, Mapping
from multiprocessing.connection import Connection
from typing import Final

_SO_MAX_PACING_RATE: Final = 47  # socket(7) on Linux; Python has no name for it
_RANGE: Final = re.compile(rb"range: bytes=(\d+)-(\d+)\r\n", re.IGNORECASE)


@contextlib.contextmanager
def paced_server(fields: Mapping[str, str], body: bytes, rate: int) -> Iterator[int]:
    """Yields the port of a server that answers everything with these header fields and this body.

    `rate` is in bytes a second over each connection.
    """
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=(there, fields, body, rate), daemon=True)
    process.start()
    try:
        yield here.recv()
    finally:
        process.terminate()
        process.join()


def _serve(starter: Connection, fields: Mapping[str, str], body: bytes, rate: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        starter.send(listening.getsockname()[1])
        while True:
            connected, _ = listening.accept()
            connected.setsockopt(socket.SOL_SOCKET, _SO_MAX_PACING_RATE, rate.to_bytes(8, "little"))
            threading.Thread(target=_answer, args=(connected, fields, memoryview(body)), daemon=True).start()


def _answer(connected: socket.socket, fields: Mapping[str, str], body: memoryview) -> None:
    with connected, contextlib.suppress(ConnectionError):
        while request := connected.recv(65536):
            start, stop, status, lines = 0, len(body), "200 OK", dict(fields)
            if asked := _RANGE.search(request):
                start, stop, status = int(asked[1]), min(int(asked[2]) + 1, len(body)), "206 Partial Content"
                lines["content-range"] = f"bytes {start}-{stop - 1}/{len(body)}"
            lines["content-length"] = str(stop - start)
            head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
            connected.sendall(f"HTTP/1.1 {status}\r\n{head}\r\n".encode())
            connected.sendall(body[start:stop])
