"""Limits on requests in flight refuse only callers above them, and cost nobody else anything."""

import contextlib
import socket
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import torch
from safetensors.torch import save
from starlette.types import Receive, Scope, Send

from prefix_service.api.middleware.in_flight import InFlightMiddleware
from prefix_service.catalog.records import Principal
from prefix_service.system.turns import ASKING
from tests.admission import generous_admission
from tests.api.helpers import CONFIG, RawAnswer, head, problem, read_answer, upload, versions_path
from tests.api.metrics.test_metrics import scraped
from tests.conftest import Server, running_server

pytestmark = pytest.mark.one_process("each process bounds its own requests in flight")

MOST, MOST_OF_TENANT = 6, 3
ADAPTER = "/v1/tenants/{}/adapters/a"
LARGE = {**CONFIG, "num_virtual_tokens": 1024}  # 128 KiB, 8 MiB with 64 rows


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Yields a service with small limits, and three tenants."""
    limits = {"PREFIX_MAX_IN_FLIGHT": str(MOST), "PREFIX_MAX_IN_FLIGHT_TENANT": str(MOST_OF_TENANT)}
    with running_server(tmp_path_factory.mktemp("in_flight") / "data", environment=limits) as running:
        for tenant in ("acme", "beta", "calm"):
            file = save({"prompt_embeddings": torch.randn(1024, 32)})
            assert upload(running.client(), tenant, "a", LARGE, file).status_code == 201
        yield running


@pytest.fixture(scope="module")
def keys(server: Server) -> dict[str, str]:
    """Returns a key of each tenant."""
    admin = server.client()
    return {
        tenant: admin.post(f"/v1/tenants/{tenant}/keys", json={"scope": "write"}).json()["key"]
        for tenant in ("acme", "beta", "calm")
    }


def connect(server: Server, receives: int | None = None) -> socket.socket:
    address = urlsplit(server.url)
    found = socket.socket()
    if receives is not None:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receives)
    found.settimeout(60)
    found.connect((address.hostname, address.port))
    return found


def in_flight(server: Server) -> int:
    """Returns the number of requests in flight without the one that asks."""
    return int(scraped(server.client())["requests_in_flight"]) - 1


def wait_for(server: Server, count: int) -> None:
    until = time.monotonic() + 60
    while in_flight(server) != count:
        assert time.monotonic() < until, in_flight(server)


@contextlib.contextmanager
def uploading(server: Server, tenant: str, key: str, count: int) -> Iterator[list[socket.socket]]:
    """Holds so many uploads of a tenant open, none of which sends its body."""
    before = in_flight(server)
    fields = {
        "Authorization": f"Bearer {key}",
        "Content-Length": "100000",
        "Content-Type": "multipart/form-data; boundary=x",
    }
    sockets = [connect(server) for _ in range(count)]
    try:
        for one in sockets:
            one.sendall(head("POST", versions_path(tenant, "new"), **fields))
        wait_for(server, before + count)
        yield sockets
    finally:
        for one in sockets:
            one.close()
        wait_for(server, before)


def refused(answer: httpx.Response) -> str:
    body = problem(answer, 503, "overloaded")
    assert int(answer.headers["retry-after"]) >= 1
    detail: str = body["detail"]
    return detail


def test_a_tenant_at_its_limit(server: Server, keys: dict[str, str]) -> None:
    """The service refuses the tenant and requests for its adapters, serves all others, and lets operators reach it."""
    acme, beta, admin = server.client(keys["acme"]), server.client(keys["beta"]), server.client()
    with uploading(server, "acme", keys["acme"], MOST_OF_TENANT) as sockets:
        words = refused(acme.get(ADAPTER.format("acme") + "/prefix"))
        assert words == "tenant 'acme' has 3 requests in flight, the most that one may have: try again"
        refused(acme.get("/v2/models/acme/a"))
        refused(admin.get(ADAPTER.format("acme")))
        assert beta.get(ADAPTER.format("beta") + "/prefix").status_code == 200
        assert admin.get(ADAPTER.format("beta")).status_code == 200
        assert admin.get("/v1/tenants/acme").status_code == 200
        assert admin.get("/v1/tenants/acme/keys").status_code == 200
        for path in ("/livez", "/readyz", "/v2/health/live", "/v2/health/ready"):
            assert acme.get(path).status_code == 200
        sockets.pop().close()
        wait_for(server, MOST_OF_TENANT - 1)
        assert acme.get(ADAPTER.format("acme") + "/prefix").status_code == 200


def test_a_process_at_its_limit(server: Server, keys: dict[str, str]) -> None:
    """A full process refuses tenants and platform keys that ask for prefixes, but no operators, scrapes and probes."""
    calm, admin = server.client(keys["calm"]), server.client()
    reader = server.client(admin.post("/v1/keys", json={"scope": "read"}).json()["key"])
    with uploading(server, "acme", keys["acme"], 3), uploading(server, "beta", keys["beta"], 3):
        words = refused(calm.get(ADAPTER.format("calm") + "/prefix"))
        assert words == "6 requests are in flight, the most that this process takes: try again"
        refused(admin.post("/v1/prefixes", json={"rows": ["calm/a"]}))
        refused(reader.get("/v2"))
        assert reader.get("/metrics").status_code == 200
        assert admin.get("/v1/tenants").status_code == 200
        assert admin.get("/v1/residency").status_code == 200
        assert calm.get("/livez").status_code == 200
    assert calm.get(ADAPTER.format("calm") + "/prefix").status_code == 200


def test_who_reads_no_public_page_takes_no_place_of_a_tenant(server: Server, keys: dict[str, str]) -> None:
    """Callers without a key that do not read their answers leave tenants their places. Others without a key get 503,
    and are served once the first have gone.
    """
    calm, stranger = server.client(keys["calm"]), server.client("")
    with contextlib.ExitStack() as stack:
        for _ in range(2 * MOST):
            reader = stack.enter_context(connect(server, receives=4096))
            reader.sendall(head("GET", "/openapi.json") * 8)
            assert reader.recv(12, socket.MSG_PEEK) in (b"HTTP/1.1 200", b"HTTP/1.1 503")
        for _ in range(5):
            assert calm.get(ADAPTER.format("calm") + "/prefix").status_code == 200
        words = refused(stranger.get("/docs"))
        assert words == "1 requests without a key are in flight, the most that this process takes: try again"
        assert stranger.get("/livez").status_code == 200
    wait_for(server, 0)
    assert stranger.get("/docs").status_code == 200


def test_refusals_and_usage_are_measured(server: Server, keys: dict[str, str]) -> None:
    """Refusals are counted by kind, without a tenant's name."""
    admin, acme = server.client(), server.client(keys["acme"])
    before = scraped(admin)
    with uploading(server, "acme", keys["acme"], MOST_OF_TENANT):
        for _ in range(5):
            refused(acme.get(ADAPTER.format("acme")))
        after = scraped(admin)
    assert after["refusals_total requests"] - before["refusals_total requests"] == 5
    assert after["requests_in_flight"] == MOST_OF_TENANT + 1
    assert after["work_budget_bytes"] > 0
    assert after["work_used_bytes"] > before["work_used_bytes"]  # of the uploads that are arriving
    assert after["work_waiting_jobs"] == 0
    assert {name for name in after if name.startswith("refusals_total")} == {
        "refusals_total requests",
        "refusals_total size",
        "refusals_total memory",
    }


@pytest.mark.parametrize("sent", [0, 1000, 8 << 20])
@pytest.mark.parametrize("expect", [False, True])
def test_a_refusal_comes_before_the_body_and_can_be_read(
    server: Server, keys: dict[str, str], sent: int, expect: bool
) -> None:
    """The service refuses before it has read the body, whatever part of it the client sent."""
    fields = {"Authorization": f"Bearer {keys['acme']}", "Content-Length": "50000000"}
    fields |= {"Content-Type": "multipart/form-data; boundary=x"} | ({"Expect": "100-continue"} if expect else {})
    with uploading(server, "acme", keys["acme"], MOST_OF_TENANT), connect(server) as one:
        one.sendall(head("POST", versions_path("acme", "new"), **fields))
        with contextlib.suppress(OSError):  # the answer comes first
            one.sendall(b"x" * sent)
        answer: RawAnswer = read_answer(one)
    assert answer.status == 503
    assert b'"overloaded"' in answer.body


def test_a_slow_reader_counts_until_the_last_byte_left(server: Server, keys: dict[str, str]) -> None:
    """A request counts until its answer was sent, however early it was ready."""
    acme = server.client(keys["acme"])
    path = ADAPTER.format("acme") + "/prefix?batch_size=64"
    request = head("GET", path, Authorization=f"Bearer {keys['acme']}")
    with contextlib.ExitStack() as stack:
        readers = [stack.enter_context(connect(server, receives=4096)) for _ in range(MOST_OF_TENANT)]
        for reader in readers:
            reader.sendall(request)
            assert reader.recv(12, socket.MSG_PEEK) == b"HTTP/1.1 200"
        wait_for(server, MOST_OF_TENANT)
        refused(acme.get(ADAPTER.format("acme")))
        assert len(read_answer(readers[0]).body) > 8 << 20
        wait_for(server, MOST_OF_TENANT - 1)
        assert acme.get(ADAPTER.format("acme")).status_code == 200
    wait_for(server, 0)


@pytest.mark.parametrize("path", ["/v1/changes", "/v1/tenants/acme/live"])
async def test_watchers_read_the_catalog_in_the_turn_of_their_tenant(path: str) -> None:
    """Though they are counted elsewhere: a tenant's watchers take no turns of the platform's admins."""
    turns = []

    async def app(_scope: Scope, _receive: Receive, _send: Send) -> None:
        turns.append(ASKING.get())

    async def nothing(*_: object) -> Any:
        raise AssertionError("nothing is received or sent")

    caller = Principal("k", "acme", "read", 1)
    scope = {"type": "http", "path": path, "headers": [(b"accept", b"text/event-stream")], "principal": caller}
    await InFlightMiddleware(app, generous_admission())(scope, nothing, nothing)
    assert turns == ["acme"]
