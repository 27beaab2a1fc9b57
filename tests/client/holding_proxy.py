"""Holds some requests back in an HTTP proxy for GETs until a test lets them go, or cuts them off."""

import contextlib
import select
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from urllib.parse import SplitResult, urlsplit


@dataclass
class Holder:
    """The proxy's URL. It holds the requests whose head contains one of `patterns`: the service does not see them."""

    url: str
    patterns: tuple[bytes, ...] = ()
    changed: threading.Condition = field(default_factory=threading.Condition)
    waiting: int = 0
    """Requests that are held now, and whose clients are there."""

    def hold(self, *patterns: bytes) -> None:
        """Holds other requests than before; held ones that match none of the patterns go on."""
        with self.changed:
            self.patterns = patterns
            self.changed.notify_all()

    def wait_for(self, count: int, seconds: float = 60) -> None:
        """Waits until so many requests are held."""
        with self.changed:
            assert self.changed.wait_for(lambda: self.waiting == count, seconds), self.waiting

    def _holds(self, head: bytes) -> bool:
        return any(pattern in head for pattern in self.patterns)

    def pass_when_free(self, head: bytes, client: socket.socket) -> bool:
        """Waits while a request is held; returns False if its client leaves before."""
        with self.changed:
            if not self._holds(head):
                return True
            self.waiting += 1
            self.changed.notify_all()
            try:
                while self._holds(head):
                    self.changed.wait(0.02)
                    if select.select([client], [], [], 0)[0]:
                        return False
                return True
            finally:
                self.waiting -= 1
                self.changed.notify_all()


@contextlib.contextmanager
def holding_proxy(url: str) -> Iterator[Holder]:
    """Yields a proxy to the server at `url`."""
    target = urlsplit(url)
    with socket.create_server(("127.0.0.1", 0), backlog=512) as listener:
        holder = Holder(f"http://127.0.0.1:{listener.getsockname()[1]}")

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    client, _ = listener.accept()
                    threading.Thread(target=_serve, args=(client, target, holder), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        try:
            yield holder
        finally:
            holder.hold()
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits in accept


def _serve(client: socket.socket, target: SplitResult, holder: Holder) -> None:
    received = b""
    with client, contextlib.suppress(OSError):
        server = socket.create_connection((str(target.hostname), int(target.port or 80)))
        with server:
            while True:
                while b"\r\n\r\n" not in received:
                    if not (data := client.recv(1 << 16)):
                        return
                    received += data
                head, _, received = received.partition(b"\r\n\r\n")
                if not holder.pass_when_free(head, client):
                    return
                server.sendall(head + b"\r\n\r\n")
                _pass_answer(server, client)


def _pass_answer(server: socket.socket, client: socket.socket) -> None:
    """Passes on one answer, whose head declares its length unless it has no body."""
    received = b""
    while b"\r\n\r\n" not in received:
        if not (data := server.recv(1 << 16)):
            raise ConnectionError("the service has gone")
        received += data
    head, _, body = received.partition(b"\r\n\r\n")
    client.sendall(received)
    lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    left = int(lengths[0].partition(b":")[2]) - len(body) if lengths and b" 304 " not in head[:16] else 0
    while left > 0:
        if not (data := server.recv(min(left, 1 << 16))):
            raise ConnectionError("the service has gone")
        client.sendall(data)
        left -= len(data)
