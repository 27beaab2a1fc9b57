"""A proxy uses one connection for all callers, and no bytes of one become a request of another."""

import contextlib
import itertools
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import pytest
import torch

from prefix_service.client import PrefixClient
from tests.api.framing.conftest import PARSERS
from tests.api.framing.proxies import haproxy, nginx
from tests.api.framing.table import exchange, filled, rows
from tests.api.framing.victim import ALIAS, TENANT, VICTIM, address, survives
from tests.conftest import Server

UPGRADE = "Connection: Upgrade\r\nUpgrade: h2c\r\n"
HALF = f"DELETE {VICTIM} HTTP/1.1\r\nX-Swallowed: ".encode()
"""The front half of a request without a key: the next caller's head would complete it, and its key would be used."""
PADDING = b"\r\n" * (100 << 10)
"""Line ends, which a parser skips between requests: as much as the service may read at a time."""


@dataclass(frozen=True, slots=True)
class Deployment:
    """A service, the URL of a proxy in front of it, and a client that asks through the proxy."""

    server: Server
    url: str
    client: httpx.Client


@pytest.fixture(scope="module", params=itertools.product(["nginx", "nginx, buffering", "HAProxy"], PARSERS), ids=str)
def deployed(
    request: pytest.FixtureRequest, servers: dict[str, Server], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Deployment]:
    """Yields one proxy in front of the service with one parser."""
    name, parser = request.param
    server, folder = servers[parser], tmp_path_factory.mktemp("proxy")
    if name == "HAProxy":
        proxy = haproxy(server.url, folder)
    else:
        proxy = nginx(server.url, folder, buffering="buffering" in name)
    with (
        proxy as url,
        httpx.Client(base_url=url, headers={"Authorization": f"Bearer {server.admin_key}"}, timeout=60) as client,
    ):
        yield Deployment(server, url, client)


def assert_own_answers(deployed: Deployment, cause: str) -> None:
    """Asks twice on the proxy's connection, and checks that each answer is that to its question and the victim
    survives."""
    for number in range(2):
        name = f"{number}-{threading.get_ident()}-{time.monotonic_ns()}"
        answer = deployed.client.get(f"/v1/tenants/{TENANT}/adapters/mine@1", headers={"X-Request-ID": name})
        assert (answer.status_code, answer.headers.get("x-request-id")) == (200, name), cause
        assert answer.json()["adapter"] == "mine", cause
    assert survives(deployed.client), cause


def test_no_row_reaches_another_caller(deployed: Deployment) -> None:
    """After each row of the table, whatever the proxy makes of it, the next callers get their own answers."""
    for row in rows():
        exchange(address(deployed.url), filled(row, deployed.server.admin_key, ALIAS, HALF), timeout=1)
        assert_own_answers(deployed, row.case)


@pytest.mark.parametrize("key", [True, False], ids=["with a key", "without a key"])
def test_a_body_behind_upgrade_deletes_nothing(deployed: Deployment, key: bool) -> None:
    """A body behind `Upgrade` that arrives after its head, or is longer than one read, and ends in half a request
    deletes nothing."""
    field = f"Authorization: Bearer {deployed.server.admin_key}\r\n" if key else ""
    attack(deployed.url, field, HALF, pause=0.3)
    assert_own_answers(deployed, "a later body")
    for size in range(len(PADDING) // 10, len(PADDING) + 1, len(PADDING) // 10):
        attack(deployed.url, field, PADDING[:size] + HALF)
        assert_own_answers(deployed, f"a body of {size} bytes")


def attack(url: str, field: str, body: bytes, pause: float = 0) -> None:
    """Posts a body behind `Upgrade`, and waits until the proxy has answered."""
    sent = f"POST {VICTIM}/prefix HTTP/1.1\r\nHost: a\r\n{field}{UPGRADE}Content-Type: application/json\r\n"
    with socket.create_connection(address(url), timeout=60) as connection:
        connection.sendall(f"{sent}Content-Length: {len(body)}\r\n\r\n".encode())
        time.sleep(pause)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError, TimeoutError):
            connection.sendall(body)
            connection.settimeout(1)
            connection.recv(65536)


def test_a_client_always_gets_the_adapter_it_asked_for(deployed: Deployment) -> None:
    """A client gets the adapter that it asked for, while callers without a key push half a request for another one in
    front of it."""
    half = f"GET /v1/tenants/{TENANT}/adapters/other/prefix HTTP/1.1\r\nX-Swallowed: ".encode()
    stop = threading.Event()

    def attack_on() -> None:
        while not stop.is_set():
            attack(deployed.url, "", PADDING + half)

    with PrefixClient(deployed.server.url, api_key=deployed.server.admin_key) as direct:
        expected = direct.get(f"{TENANT}/mine")
    attacker = threading.Thread(target=attack_on)
    attacker.start()
    try:
        until = time.monotonic() + 2
        while time.monotonic() < until:
            with PrefixClient(deployed.url, api_key=deployed.server.admin_key) as client:
                found = client.get(f"{TENANT}/mine")
            for ours, theirs in zip(found.past_key_values, expected.past_key_values, strict=True):
                assert torch.equal(ours[0], theirs[0])
                assert torch.equal(ours[1], theirs[1])
    finally:
        stop.set()
        attacker.join()
