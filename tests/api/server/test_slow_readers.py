"""Readers that read slowly, on a real server: what they hold is their tenant's, and ends with them."""

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.api.helpers import assert_alive, head, problem, versions_path
from tests.conftest import Server, running_server

LARGE: dict[str, Any] = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 64, "num_layers": 8} | {
    "num_attention_heads": 8,
    "token_dim": 512,
}  # 2 MiB in float32, of which each layer is an eighth
SMALL = {**LARGE, "num_layers": 1}
MIB = 1 << 20
SEND = 5.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A service with less room than what the slow tenant's readers ask for."""
    environment = {"PREFIX_RENDERING_BYTES": str(5 * MIB)}
    with running_server(tmp_path_factory.mktemp("slow") / "data", environment=environment) as running:
        publish(running)
        yield running


@pytest.fixture(scope="module", params=["httptools", "h11"])
def impatient(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A service with this parser that cuts readers off soon."""
    environment = {"PREFIX_HTTP_PARSER": request.param, "PREFIX_SEND_TIMEOUT": str(SEND)}
    with running_server(tmp_path_factory.mktemp(request.param) / "data", environment=environment) as running:
        publish(running)
        yield running


def publish(server: Server) -> None:
    """Adapters of both tenants."""
    client = server.client()
    made = [client.post(versions_path("slow", "large"), json={"config": LARGE, "seed": 1})]
    made += [
        client.post(versions_path("calm", f"a{number}"), json={"config": SMALL, "seed": number}) for number in range(8)
    ]
    assert {answer.status_code for answer in made} == {201}


def read_key(server: Server, tenant: str) -> str:
    """A new key of a tenant."""
    key: str = server.client().post(f"/v1/tenants/{tenant}/keys", json={"scope": "read"}).json()["key"]
    return key


def reading(server: Server, key: str, path: str) -> socket.socket:
    """A reader that asked, and reads nothing yet; a small buffer lets the service notice it."""
    address = urlsplit(server.url)
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 << 10)
    connection.settimeout(60)
    connection.connect((address.hostname, address.port))
    connection.sendall(head("GET", path, Authorization=f"Bearer {key}"))
    return connection


def held(client: httpx.Client) -> int:
    """Leases of renderings that have not ended."""
    found: int = client.get("/v1/residency").json()["tiers"][1]["readers"]
    return found


@pytest.mark.parametrize("resident", [False, True], ids=["cold", "resident"])
def test_a_tenants_slow_readers_refuse_nobody_else(server: Server, resident: bool) -> None:
    """Many readers of other layers each, of one read key, hold their tenant's part, whether their renderings were there
    before or not. Their own tenant waits for them, a neighbour's cold and warm reads do not."""
    key, admin = read_key(server, "slow"), server.client()
    neighbour = server.client(read_key(server, "calm"))
    parts = ("", "&kv_heads=0:4", "&kv_heads=4:8", "&dtype=float16")  # together all of the budget
    queries = [f"batch_size=64&layers={layer}:{layer + 1}{part}" for part in parts for layer in range(8)]
    paths = [f"/v1/tenants/slow/adapters/large@1/prefix?{query}" for query in queries]
    if resident:
        for path in paths:
            assert admin.get(path.replace("=64", "=1")).status_code == 200
    with ExitStack() as stack:
        for path in paths:
            stack.enter_context(reading(server, key, path))
        deadline = time.monotonic() + 60
        while held(admin) < 8 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert held(admin) >= 8
        found = [neighbour.get(f"/v1/tenants/calm/adapters/a{number}@1/prefix") for number in [*range(8), *range(8)]]
        assert [answer.status_code for answer in found] == [200] * 16
        last = admin.get("/v1/tenants/slow/adapters/large@1/prefix")
        assert "tenant 'slow'" in problem(last, 503, "overloaded")["detail"]
        assert int(last.headers["retry-after"]) >= 1
    deadline = time.monotonic() + 60
    while held(admin) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert held(admin) == 0
    assert admin.get("/v1/tenants/slow/adapters/large@1/prefix").status_code == 200
    assert_alive(server)


def unsent(server: Server) -> list[int]:
    """Bytes that the kernel has to send on each of the service's connections, whatever their state."""
    port = urlsplit(server.url).port
    with open("/proc/net/tcp") as table:  # noqa: PTH123  # a file of the kernel
        rows = [line.split() for line in table][1:]
    return [int(row[4].split(":")[0], 16) for row in rows if int(row[1].split(":")[1], 16) == port and row[3] != "0A"]


def test_a_reader_that_is_cut_off_leaves_nothing_in_the_kernel(impatient: Server) -> None:
    """Neither while it does not read, above a bound, nor after the cut: no connection waits to send anything."""
    key = read_key(impatient, "slow")
    path = "/v1/tenants/slow/adapters/large@1/prefix?batch_size=64"
    with ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(reading(impatient, key, path))
        deadline = time.monotonic() + 60
        while len(waiting := [nbytes for nbytes in unsent(impatient) if nbytes]) < 4 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert len(waiting) == 4
        assert max(waiting) < MIB
        deadline = time.monotonic() + 60
        while any(unsent(impatient)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(unsent(impatient))


def test_an_answer_that_nobody_reads_leaves_the_kernel_too(impatient: Server) -> None:
    """It was written whole and the connection closed behind it: the kernel would keep it for minutes."""
    key = read_key(impatient, "slow")
    path = "/v1/tenants/slow/adapters/large@1/prefix?layers=0:1"
    address = urlsplit(impatient.url)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 10)
        connection.connect((address.hostname, address.port))
        connection.sendall(head("GET", path, Authorization=f"Bearer {key}", Connection="close"))
        deadline = time.monotonic() + 60
        while not any(unsent(impatient)) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert any(unsent(impatient))
        deadline = time.monotonic() + 60
        while any(unsent(impatient)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(unsent(impatient))
