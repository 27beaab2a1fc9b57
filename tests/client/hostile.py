"""A server that answers as a script says, byte by byte, and a small prefix to answer with."""

import contextlib
import re
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from prefix_service.prefix.variant import DtypePair, Identity, Variant
from prefix_service.prefix.wire.digests import digest_of, format_digest
from prefix_service.prefix.wire.masks import AttentionMask
from prefix_service.prefix.wire.prefix_file import PrefixFile
from prefix_service.prefix.wire.rendering import Rendering

Script = Callable[[socket.socket], None]
"""Serves one connection."""


def prefix_body(tokens: int = 20, layers: int = 3) -> bytes:
    """Returns a prefix as the service sends it to this client: `[1, layers, 2, 2, tokens, 8]` float32, counting up."""
    identity = Identity("a", "b", 1, "sha256:" + "0" * 64, "PREFIX_TUNING", "base", tokens, layers, 2, 8)
    variant = Variant(DtypePair.both("float32"), 1, (0, layers), (0, 2), "stacked", expand=False)
    values = torch.arange(layers * 2 * 2 * tokens * 8, dtype=torch.float32).view(layers, 2, 2, tokens, 8)
    mask = AttentionMask(1, tokens, torch.int64)
    return b"".join(PrefixFile(identity, variant, {"attention_mask": mask}).chunks(Rendering({"key_value": values})))


BODY = prefix_body()


def repr_digest(body: bytes = BODY) -> str:
    """Returns the header line of a body's digest."""
    return f"Repr-Digest: {format_digest('crc32c', digest_of('crc32c', body))}"


def answer(body: bytes = BODY, *lines: str, status: str = "200 OK") -> bytes:
    """Returns a plain answer, with more header lines."""
    head = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", 'ETag: "e"', repr_digest(body), *lines]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


@dataclass
class Hostile:
    """The server's URL, and what it has read: the requests of each connection, in order."""

    url: str
    uds: str | None
    requests: list[list[bytes]] = field(default_factory=list)


def read_request(connection: socket.socket) -> bytes:
    """Returns one request's head, and its body if it has a length, or what came of it if the client has gone."""
    received = b""
    while b"\r\n\r\n" not in received and (data := connection.recv(65536)):
        received += data
    head, _, body = received.partition(b"\r\n\r\n")
    length = re.search(rb"\r\ncontent-length: ([0-9]+)", head.lower())
    missing = int(length[1]) - len(body) if length else 0
    while missing > 0 and (data := connection.recv(65536)):
        received += data
        missing -= len(data)
    return received


def says(*answers: bytes) -> Script:
    """Returns a script that answers the requests of one connection, which then ends."""

    def script(connection: socket.socket) -> None:
        for each in answers:
            read_request(connection)
            connection.sendall(each)

    return script


@contextlib.contextmanager
def hostile_server(*scripts: Script, uds: bool = False) -> Iterator[Hostile]:
    """Yields a server with a script for each connection, over TCP or a Unix socket; the last one serves all others."""
    with contextlib.ExitStack() as stack:
        if uds:
            path = f"{stack.enter_context(tempfile.TemporaryDirectory())}/s"
            listener = stack.enter_context(socket.create_server(path, family=socket.AF_UNIX))
            server = Hostile("http://hostile", path)
        else:
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            server = Hostile(f"http://127.0.0.1:{listener.getsockname()[1]}", None)
        threading.Thread(target=_accept, args=(listener, server, scripts), daemon=True).start()
        yield server
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)  # wakes who waits in accept


def _accept(listener: socket.socket, server: Hostile, scripts: tuple[Script, ...]) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        script = scripts[min(len(server.requests), len(scripts) - 1)]
        seen: list[bytes] = []
        server.requests.append(seen)
        threading.Thread(target=_serve, args=(connection, script, seen), daemon=True).start()


class _Recording:
    """A connection whose requests are remembered."""

    def __init__(self, connection: socket.socket, seen: list[bytes]) -> None:
        self._connection, self._seen = connection, seen

    def recv(self, size: int) -> bytes:
        data = self._connection.recv(size)
        if data:
            self._seen.append(data)
        return data

    def __getattr__(self, name: str) -> object:
        return getattr(self._connection, name)


def _serve(connection: socket.socket, script: Script, seen: list[bytes]) -> None:
    with connection, contextlib.suppress(OSError):
        script(_Recording(connection, seen))  # type: ignore[arg-type]  # all of a socket that scripts use
