"""Counts what passes through a TCP proxy."""

import contextlib
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit


@dataclass
class Counted:
    """The proxy's URL, the connections that clients have made, and the bytes that have passed towards them."""

    url: str
    received: int = 0
    connections: int = 0

    def taken(self) -> int:
        """Returns the bytes since its last call."""
        taken, self.received = self.received, 0
        return taken


@contextlib.contextmanager
def counting_proxy(url: str) -> Iterator[Counted]:
    """Yields a proxy to the server at `url`; it counts before it passes on, so that all that was read is counted."""
    target = urlsplit(url)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        counted = Counted(f"http://127.0.0.1:{listener.getsockname()[1]}")
        arguments = (listener, (str(target.hostname), int(target.port or 80)), counted)
        threading.Thread(target=_accept, args=arguments, daemon=True).start()
        yield counted
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)  # wakes who waits in accept


def _accept(listener: socket.socket, target: tuple[str, int], counted: Counted) -> None:
    while True:
        try:
            client, _ = listener.accept()
        except OSError:
            return
        counted.connections += 1
        server = socket.create_connection(target)
        threading.Thread(target=_pass, args=(client, server, None), daemon=True).start()
        threading.Thread(target=_pass, args=(server, client, counted), daemon=True).start()


def _pass(source: socket.socket, target: socket.socket, counted: Counted | None) -> None:
    with source, contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            if counted is not None:
                counted.received += len(data)
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_RDWR)
