"""A client in front of a real service: faults on the way, deadlines, sockets, certificates."""

import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from prefix_service.client import PrefixClient
from prefix_service.errors import ConnectionFailed, InvalidResponse
from tests.client.conftest import LLAMA, Counting
from tests.client.test_client import published
from tests.conftest import Server, running_server


@pytest.fixture(scope="module")
def adapter(server: Server) -> str:
    """Publishes an adapter to fetch."""
    with PrefixClient(server.url, server.admin_key) as client:
        published(client, "transport/a")
    return "transport/a"


def flip_last_byte(body: bytes) -> bytes:
    """Damages a body where no length and no header shows it."""
    return body[:-1] + bytes([body[-1] ^ 1])


def test_a_damaged_body_is_noticed_by_its_digest(server: Server, adapter: str) -> None:
    """A flipped bit is an error; without `verify_digest` the tensors come as they are."""
    careful = PrefixClient(server.url, server.admin_key, http=Counting(flip_last_byte))
    with careful, pytest.raises(InvalidResponse, match="damaged"):
        careful.get(adapter)
    with PrefixClient(server.url, server.admin_key, verify_digest=False, http=Counting(flip_last_byte)) as trusting:
        assert trusting.get(adapter).version == 1


def test_an_intact_body_passes_the_digest_check(server: Server, adapter: str) -> None:
    """The digest that the service sends is that of the body."""
    with PrefixClient(server.url, server.admin_key, verify_digest=True) as client:
        assert client.get(adapter).version == 1


def test_a_body_that_is_no_prefix_is_told(server: Server, adapter: str) -> None:
    """A body that is no prefix is InvalidResponse."""
    client = PrefixClient(server.url, server.admin_key, http=Counting(lambda _: b"<html>"))
    with client, pytest.raises(InvalidResponse):
        client.get(adapter)


def test_a_silent_server_meets_the_deadline() -> None:
    """A server that accepts and never answers costs no more than the timeout."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        client = PrefixClient(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout=0.5)
        with client, pytest.raises(ConnectionFailed, match="in time"):
            client.get("a/b")
        assert time.monotonic() - began < 40


def test_a_call_outlives_a_restart(tmp_path: Path) -> None:
    """A call succeeds if the service comes back within the deadline."""
    with running_server(tmp_path / "data") as first:
        port, key = first.url.rpartition(":")[2], first.admin_key
        with PrefixClient(first.url, key) as client:
            published(client, "again/a")
    with PrefixClient(first.url, key, timeout=150) as client:
        found: list[int] = []
        waiting = threading.Thread(target=lambda: found.append(client.get("again/a").version))
        waiting.start()
        with running_server(tmp_path / "data", "--port", port):
            waiting.join()
        assert found == [1]


def test_a_unix_socket(tmp_path: Path) -> None:
    """`PrefixClient(uds=…)` reaches a service started with `serve --uds`."""
    path = tmp_path / "s.sock"
    with (
        running_server(tmp_path / "data", "--uds", str(path), uds=path) as server,
        PrefixClient("http://prefix-service", server.admin_key, uds=path) as client,
    ):
        assert published(client, "uds/a")["version"] == 1
        assert client.get("uds/a").num_virtual_tokens == 20


@contextmanager
def tls_in_front_of(url: str, folder: Path) -> Iterator[tuple[str, Path]]:
    """Yields the URL of a TLS proxy with a certificate of its own authority, and the authority's file."""
    certificate, key = folder / "ca.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    target = ("127.0.0.1", int(url.rpartition(":")[2]))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=_accept, args=(listener, context, target), daemon=True).start()
        yield f"https://localhost:{listener.getsockname()[1]}", certificate


def _accept(listener: socket.socket, context: ssl.SSLContext, target: tuple[str, int]) -> None:
    while True:
        try:
            plain, _ = listener.accept()
        except OSError:
            return
        try:
            inner = context.wrap_socket(plain, server_side=True)
        except ssl.SSLError:
            plain.close()
            continue
        outer = socket.create_connection(target)
        for source, sink in ((inner, outer), (outer, inner)):
            threading.Thread(target=_pump, args=(source, sink), daemon=True).start()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    try:
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        pass
    finally:
        sink.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the proxy's half-closed sockets
def test_tls_with_an_authority_of_ones_own(server: Server, adapter: str, tmp_path: Path) -> None:
    """With `ca_file` the proxy's certificate is trusted, and without it refused."""
    with tls_in_front_of(server.url, tmp_path) as (url, ca_file):
        with PrefixClient(url, server.admin_key, ca_file=ca_file) as client:
            assert client.get(adapter).version == 1
        with PrefixClient(url, server.admin_key, timeout=1) as client, pytest.raises(ConnectionFailed):
            client.get(adapter)


def test_publishing_is_retried_from_the_beginning_of_the_file(tmp_path: Path) -> None:
    """Another try of a publication reads the weights again from their beginning."""
    with running_server(tmp_path / "data") as first:
        port, key = first.url.rpartition(":")[2], first.admin_key
    weights = (LLAMA / "adapter_model.safetensors").open("rb")
    with weights, PrefixClient(first.url, key, timeout=150) as client:
        done: list[bool] = []
        config = (LLAMA / "adapter_config.json").read_bytes()
        publishing = threading.Thread(target=lambda: done.append(client.publish_files("again/b", config, weights)[1]))
        publishing.start()
        with running_server(tmp_path / "data", "--port", port):
            publishing.join()
        assert done == [True]
