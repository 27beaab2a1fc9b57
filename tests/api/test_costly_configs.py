"""Configs that cost much memory and time are charged to their tenant, and others notice nothing."""

import json
import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from http.client import HTTPResponse
from urllib.parse import urlsplit

import pytest

from tests.api.attacks import SILENCE, harm
from tests.api.helpers import CONFIG, MEDIA_TYPE, assert_alive, head, problem, upload, versions_path
from tests.conftest import Server, running_server
from tests.processes import eventually

MIB = 1 << 20
WORK = 128 * MIB


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Yields a service with a small budget for work in progress, and three tenants."""
    folder = tmp_path_factory.mktemp("costly") / "data"
    with running_server(folder, environment={"PREFIX_WORK_BYTES": str(WORK)}) as running:
        for tenant in ("evil", "bad", "calm"):
            assert upload(running.client(), tenant, "a").status_code == 201
        yield running


def connected(stack: ExitStack, server: Server, request: bytes) -> socket.socket:
    """Returns a connection on which as much of the request was sent as the server took within a moment."""
    address = urlsplit(server.url)
    connection = stack.enter_context(socket.create_connection((address.hostname, address.port)))
    connection.setblocking(False)
    connection.send(request)
    return connection


def jobs_wait(server: Server) -> bool:
    """Returns whether work waits for memory now."""
    found = re.search(r"^\w*work_waiting_jobs(?:{[^}]*})? (\S+)", server.client().get("/metrics").text, re.MULTILINE)
    assert found is not None
    return float(found[1]) > 0


def test_lists_in_a_base_models_config_are_counted(server: Server) -> None:
    """A megabyte of empty lists is refused before it is parsed."""
    client = server.client(server.key("write", "evil"))
    base = b'{"a":[' + b",".join([b"[]"] * 349_000) + b"]}"
    parts = {
        "adapter_config.json": json.dumps(CONFIG).encode(),
        "base_model_config": base,
        "adapter_model.safetensors": b"",
    }
    with harm(server) as done, ThreadPoolExecutor(12) as pool:
        for answer in pool.map(lambda _: client.post(versions_path("evil", "b"), files=parts), range(12)):
            assert "349002 of them lists and objects" in problem(answer, 422, "invalid-config")["detail"]
    assert done.silence < SILENCE, done


def test_configs_of_uploads_that_stall_take_reserved_memory(server: Server) -> None:
    """Two hundred uploads stall behind a megabyte of a base model's config; those for which the budget has no room are
    not read."""
    key = server.key("write", "evil")
    part = '--B\r\nContent-Disposition: form-data; name="{}"; filename="f"\r\n\r\n{}\r\n'
    base = json.dumps({"a": "x" * (MIB - 20)})
    body = part.format("adapter_config.json", json.dumps(CONFIG)) + part.format("base_model_config", base)
    fields = {
        "authorization": f"Bearer {key}",
        "content_type": "multipart/form-data; boundary=B",
        "content_length": str(len(body) + 4 * MIB),
    }
    request = head("POST", versions_path("evil", "c"), **fields) + body.encode()
    with harm(server) as done, ExitStack() as stack:
        sockets = [connected(stack, server, request) for _ in range(200)]
        eventually(lambda: jobs_wait(server))
        assert upload(server.client(), "calm", "small", {**CONFIG, "revision": "x"}).status_code == 201
        assert len(sockets) == 200
    assert done.memory < WORK + 32 * MIB
    assert_alive(server)


def test_two_tenants_with_large_bodies_leave_room_for_a_small_one(server: Server) -> None:
    """Two tenants that announce bodies as large as the budget, and send a byte of each, leave room for a third."""

    keys = {tenant: server.key("read", tenant) for tenant in ("evil", "bad")}

    def announce(stack: ExitStack, tenant: str, nbytes: int) -> None:
        fields = {"authorization": f"Bearer {keys[tenant]}", "content_type": MEDIA_TYPE, "content_length": str(nbytes)}
        connected(stack, server, head("POST", f"/v1/tenants/{tenant}/adapters/a/prefix", **fields) + b"{")

    client = server.client(server.key("read", "calm"))
    with ExitStack() as stack:
        for _ in range(16):
            announce(stack, "evil", 4 * MIB)
        for _ in range(2):
            announce(stack, "bad", 64 * MIB)
        eventually(lambda: jobs_wait(server))
        began = time.monotonic()
        answer = client.post("/v1/tenants/calm/adapters/a/prefix", json={"attention_mask": [[1]]})
        assert answer.status_code == 200, answer.text
        assert time.monotonic() - began < 30


def test_long_configs_are_shown_in_their_tenants_turn(server: Server) -> None:
    """Two hundred requests for a config of sixty kilobytes wait in their tenant's turn: each has the config, or where
    this machine is slow a refusal that names what it waited behind; and `/livez` goes on answering."""
    config = {**CONFIG, "x": [[]] * 14_000}
    assert upload(server.client(), "evil", "long", config).status_code == 201
    request = head("GET", "/v1/tenants/evil/adapters/long", authorization=f"Bearer {server.key('read', 'evil')}")
    with harm(server) as done, ExitStack() as stack:
        for connection in [connected(stack, server, request) for _ in range(200)]:
            connection.setblocking(True)
            with HTTPResponse(connection) as answer:
                answer.begin()
                waited = "behind other requests of tenant 'evil'"
                assert answer.status == 200 or (answer.status == 503 and waited in answer.read().decode())
    assert done.silence < SILENCE, done
