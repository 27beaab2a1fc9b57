"""Addresses of one service: TCP forwarders that count requests, and that can refuse, hang or cut connections."""

import contextlib
import socket
import struct
import threading
from collections.abc import Iterator
from urllib.parse import urlsplit

_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: a close sends RST


class Forwarder:
    """One address of the service at `target`. `mode` is what it does with the next requests: `passes` them on, `hangs`
    until the mode changes, or `cuts` the connection."""

    def __init__(self, target: str, host: str = "127.0.0.1", port: int = 0) -> None:
        there = urlsplit(target)
        self._target, self._host = (str(there.hostname), int(there.port or 80)), host
        self.heads: list[bytes] = []
        self._mode, self._changed = "passes", threading.Condition()
        self._open: list[socket.socket] = []
        self.port = port
        self.listen()

    @property
    def url(self) -> str:
        """Returns the address."""
        return f"http://{self._host}:{self.port}"

    def listen(self) -> None:
        """Accepts connections, again if it was away."""
        self._listener = socket.create_server((self._host, self.port))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def leave(self) -> None:
        """Closes all connections, and refuses others."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread in accept
        self._listener.close()
        for each in self._open:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        self.become("cuts")

    def become(self, mode: str) -> None:
        """Treats the next requests, and those that hang, in another way."""
        with self._changed:
            self._mode = mode
            self._changed.notify_all()

    def taken(self) -> int:
        """Returns how many requests have come since its last call."""
        taken, self.heads = len(self.heads), []
        return taken

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            self._open.append(client)
            threading.Thread(target=self._forward, args=(client,), daemon=True).start()

    def _forward(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError), socket.create_connection(self._target) as server:
            back = threading.Thread(target=_pump, args=(server, client), daemon=True)
            back.start()
            try:
                self._pass_on(client, server)
            finally:
                client.close()
                # Were it closed while the other thread receives, another connection's socket could get its number.
                server.shutdown(socket.SHUT_RDWR)
                back.join()

    def _pass_on(self, client: socket.socket, server: socket.socket) -> None:
        while data := client.recv(1 << 16):
            if b" HTTP/1.1\r\n" in data:
                self.heads.append(data)
            with self._changed:
                self._changed.wait_for(lambda: self._mode != "hangs", 120)
            if self._mode == "cuts":
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                return
            server.sendall(data)


def _pump(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
        target.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def forwarders(target: str, *places: tuple[str, int]) -> Iterator[list[Forwarder]]:
    """Yields forwarders at these hosts and ports."""
    found = [Forwarder(target, host, port) for host, port in places]
    yield found
    for each in found:
        each.leave()
