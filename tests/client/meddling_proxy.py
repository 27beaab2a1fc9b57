"""An HTTP proxy that changes the question to the service, and passes the answer on unchanged."""

import contextlib
import re
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

_LENGTH = re.compile(rb"\r\ncontent-length: *([0-9]+)\r\n", re.IGNORECASE)


@dataclass
class Meddler:
    """The proxy's URL; in each request's head that contains `only` it replaces the keys of `swaps` by their values."""

    url: str
    uds: str | None = None
    swaps: dict[bytes, bytes] = field(default_factory=dict)
    only: bytes = b""
    swapped: int = 0
    """Requests that were changed."""

    def changed(self, head: bytes) -> bytes:
        """Returns the head that the service is sent."""
        for asked, other in self.swaps.items():
            if asked in head and self.only in head:
                self.swapped += 1
                head = head.replace(asked, other)
        return head


@contextlib.contextmanager
def meddling_proxy(url: str, uds: str | Path | None = None, listen: Path | None = None) -> Iterator[Meddler]:
    """Yields a proxy to the server at `url`, or at the Unix socket `uds`; it listens on `listen`, or on TCP."""
    target = urlsplit(url)
    with contextlib.ExitStack() as stack:
        if listen is None:
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            meddler = Meddler(f"http://127.0.0.1:{listener.getsockname()[1]}")
        else:
            listener = stack.enter_context(socket.create_server(str(listen), family=socket.AF_UNIX))
            meddler = Meddler(url, str(listen))

        def dial() -> socket.socket:
            if uds is None:
                return socket.create_connection((str(target.hostname), int(target.port or 80)))
            dialled = socket.socket(socket.AF_UNIX)
            dialled.connect(str(uds))
            return dialled

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    client, _ = listener.accept()
                    server = dial()
                    threading.Thread(target=_requests, args=(client, server, meddler), daemon=True).start()
                    threading.Thread(target=_answers, args=(server, client), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield meddler
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits in accept


def _requests(client: socket.socket, server: socket.socket, meddler: Meddler) -> None:
    received = b""
    with client, contextlib.suppress(OSError):
        while True:
            while b"\r\n\r\n" not in received:
                if not (data := client.recv(1 << 16)):
                    raise ConnectionError("the client has gone")
                received += data
            head, _, received = received.partition(b"\r\n\r\n")
            found = _LENGTH.search(head + b"\r\n")
            left = int(found[1]) if found else 0
            server.sendall(meddler.changed(head + b"\r\n\r\n"))
            while left:
                body, received = received[:left] or client.recv(min(left, 1 << 16)), received[left:]
                server.sendall(body)
                left -= len(body)
    with contextlib.suppress(OSError):
        server.shutdown(socket.SHUT_RDWR)


def _answers(server: socket.socket, client: socket.socket) -> None:
    with server, contextlib.suppress(OSError):
        while data := server.recv(1 << 16):
            client.sendall(data)
    with contextlib.suppress(OSError):
        client.shutdown(socket.SHUT_RDWR)
