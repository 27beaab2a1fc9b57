"""Many parallel requests through the real server: uploads, loads, deletions, aliases, cancellations."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import torch
from safetensors.torch import save

from tests.api.helpers import CONFIG, head, problem, upload, weights
from tests.conftest import Server, running_server

# 4 layers, 4 heads of 64, 128 tokens, float32: 1 MiB of keys and values, 256 MiB in a batch of 256.
LARGE = {**CONFIG, "num_virtual_tokens": 128, "num_layers": 4, "num_attention_heads": 4, "token_dim": 256}
LARGE_SIZE = 1 << 20


def large(seed: int) -> bytes:
    """Returns a sound weights file for LARGE."""
    flat = torch.randn((128, 2048), generator=torch.Generator().manual_seed(seed))
    return save({"prompt_embeddings": flat})


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Yields a server with room for three large prefixes, whose counts are this module's alone."""
    budget = str(3 * LARGE_SIZE + 65_536)
    environment = {"PREFIX_DEVICE_BYTES": budget, "PREFIX_RENDERING_BYTES": budget}
    with running_server(tmp_path_factory.mktemp("races") / "data", environment=environment) as running:
        for number in range(8):
            assert upload(running.client(), "races", f"large-{number}", LARGE, large(number)).status_code == 201
        yield running


def tiers(server: Server) -> list[dict[str, Any]]:
    """Returns the server's reports of its memory: the device, then the host."""
    found: list[dict[str, Any]] = server.client().get("/v1/residency").json()["tiers"]
    return found


def prefix_path(number: int, query: str = "") -> str:
    return f"/v1/tenants/races/adapters/large-{number}@1/prefix{query}"


def unload(server: Server, number: int) -> None:
    assert server.client().delete(f"/v1/tenants/races/adapters/large-{number}/residency").status_code == 204


def at_once(calls: Sequence[Callable[[], httpx.Response]]) -> list[httpx.Response]:
    """Runs all calls in parallel, released together."""
    barrier = threading.Barrier(len(calls))

    def call(one: Callable[[], httpx.Response]) -> httpx.Response:
        barrier.wait(30)
        return one()

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(call, calls))


def test_hardening_38_uploads_of_the_same_content_at_once(server: Server) -> None:
    """Of parallel uploads of one content one gets 201, and the rest 200 with the same version."""
    clients = [server.client() for _ in range(12)]
    answers = at_once([partial(upload, client, "races-same", "a") for client in clients])
    assert sorted(answer.status_code for answer in answers) == [200] * 11 + [201]
    assert {(answer.json()["version"], answer.json()["digest"]) for answer in answers} == {
        (1, answers[0].json()["digest"])
    }


def test_hardening_38_uploads_of_different_contents_at_once(server: Server) -> None:
    """Parallel uploads of different contents get consecutive numbers, each with its own content."""
    clients = [server.client() for _ in range(12)]
    answers = at_once(
        [partial(upload, client, "races-own", "a", file=weights(seed)) for seed, client in enumerate(clients)]
    )
    assert {answer.status_code for answer in answers} == {201}
    assert sorted(answer.json()["version"] for answer in answers) == list(range(1, 13))
    for seed, answer in enumerate(answers):
        path = f"/v1/tenants/races-own/adapters/a@{answer.json()['version']}/parameters"
        assert clients[0].get(path).content == weights(seed)


def test_hardening_39_cold_requests_for_one_adapter_at_once(small: Server) -> None:
    """Parallel cold requests for one adapter share one load and one rendering, and get equal answers."""
    unload(small, 0)
    before = tiers(small)
    clients = [small.client() for _ in range(16)]
    answers = at_once([partial(client.get, prefix_path(0)) for client in clients])
    after = tiers(small)
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.content for answer in answers}) == 1
    assert [now["loads"] - then["loads"] for now, then in zip(after, before, strict=True)] == [1, 1]


class Transfer:
    """A reader that takes the head of a large answer and the first bytes, and goes on when it is told to."""

    def __init__(self, server: Server, path: str) -> None:
        self._client = server.client()
        self._stream = self._client.stream("GET", path)
        self._answer = self._stream.__enter__()
        assert self._answer.status_code == 200
        self._pieces = self._answer.iter_raw()
        self._first = next(self._pieces)

    def rest(self) -> bytes:
        """Returns the whole body."""
        body = self._first + b"".join(self._pieces)
        self._stream.__exit__(None, None, None)
        return body


def end_by_eviction(server: Server) -> None:
    """Asks for more other adapters than there is room for."""
    for number in range(2, 8):
        deadline = time.monotonic() + 60
        while server.client().get(prefix_path(number)).status_code == 503 and time.monotonic() < deadline:
            time.sleep(0.05)


def end_by_deletion(server: Server) -> None:
    assert server.client().delete("/v1/tenants/races/adapters/large-1@1").status_code == 204


def end_by_the_tenants_deletion(server: Server) -> None:
    assert server.client().delete("/v1/tenants/races").status_code == 204


@pytest.mark.parametrize(
    ("end", "status"),
    [
        (end_by_eviction, 200),
        (lambda server: unload(server, 1), 200),
        (end_by_deletion, 404),
        (end_by_the_tenants_deletion, 404),
    ],
    ids=["eviction", "unload", "deletion", "tenant"],
)
def test_hardening_40_the_end_of_a_version_during_a_transfer(
    tmp_path: Path, end: Callable[[Server], None], status: int
) -> None:
    """A transfer completes with the right bytes although its version ends; later requests get the new state."""
    environment = {name: str(4 * LARGE_SIZE + 65_536) for name in ("PREFIX_DEVICE_BYTES", "PREFIX_RENDERING_BYTES")}
    with running_server(tmp_path / "data", environment=environment) as server:
        for number in range(1, 8):
            upload(server.client(), "races", f"large-{number}", LARGE, large(number))
        row = server.client().get(prefix_path(1, "?layout=stacked&expand=false")).content[-LARGE_SIZE:]
        transfer = Transfer(server, prefix_path(1, "?layout=stacked&batch_size=32"))
        end(server)
        later = server.client().get(prefix_path(1))
        assert later.status_code == status, later.text[:200]
        assert transfer.rest().endswith(row * 32)


@pytest.mark.one_process("what is in memory is each replica's own")
def test_hardening_41_a_waiter_that_goes_away(small: Server) -> None:
    """A caller that hangs up, also the first one, does not end the load for the others."""
    unload(small, 2)
    before = tiers(small)
    address = urlsplit(small.url)
    request = head("GET", prefix_path(2), Authorization=f"Bearer {small.admin_key}")
    for _ in range(4):
        with socket.create_connection((address.hostname, address.port)) as gone:
            gone.sendall(request)
    clients = [small.client() for _ in range(4)]
    answers = at_once([partial(client.get, prefix_path(2)) for client in clients])
    assert {answer.status_code for answer in answers} == {200}
    assert tiers(small)[0]["loads"] - before[0]["loads"] == 1


def test_hardening_43_conditions_that_no_longer_hold(server: Server) -> None:
    """A stale If-Match, and If-None-Match: * for an existing alias, are 412, and nothing moves."""
    client, path = server.client(), "/v1/tenants/races-alias/adapters/a/aliases/prod"
    for seed in range(3):
        upload(client, "races-alias", "a", file=weights(seed))
    seen = client.put(path, json={"version": 1}).headers["etag"]
    assert client.put(path, json={"version": 2}, headers={"If-Match": seen}).status_code == 200
    for headers in ({"If-Match": seen}, {"If-None-Match": "*"}):
        problem(client.put(path, json={"version": 3}, headers=headers), 412, "precondition-failed")
    assert client.get(path).json()["version"] == 2


def test_hardening_43_moves_at_once(server: Server) -> None:
    """Of parallel moves with the same If-Match one succeeds, and the others get 412."""
    client, path = server.client(), "/v1/tenants/races-alias/adapters/a/aliases/eu"
    for seed in range(3):
        upload(client, "races-alias", "a", file=weights(seed))
    seen = client.put(path, json={"version": 1}).headers["etag"]
    clients = [server.client() for _ in range(8)]
    calls = [
        partial(client.put, path, json={"version": 2 + number % 2}, headers={"If-Match": seen})
        for number, client in enumerate(clients)
    ]
    assert sorted(answer.status_code for answer in at_once(calls)) == [200] + [412] * 7


def test_hardening_44_loads_over_the_budget_at_once(small: Server) -> None:
    """Bytes are reserved before they are allocated, so the budget always holds; callers without room get Retry-After,
    and all are served in the end."""
    stop = threading.Event()
    seen: list[tuple[int, int]] = []

    def watch() -> None:
        client = small.client()
        while not stop.is_set():
            seen.extend((tier["used"], tier["budget"]) for tier in client.get("/v1/residency").json()["tiers"])

    def fetch(number: int) -> None:
        client = small.client()
        deadline = time.monotonic() + 60
        for _ in range(5):
            while (answer := client.get(prefix_path(number % 8))).status_code == 503:
                assert json.loads(answer.text)["code"] == "unavailable"
                assert answer.headers["retry-after"].isdigit()
                assert time.monotonic() < deadline
                time.sleep(0.02)
            assert answer.status_code == 200

    with ThreadPoolExecutor(17) as pool:
        watching = pool.submit(watch)
        for fetching in [pool.submit(fetch, number) for number in range(16)]:
            fetching.result(90)
        stop.set()
        watching.result(60)
    assert len(seen) > 10
    assert all(used <= budget for used, budget in seen)


@pytest.mark.one_process("what is in memory is each replica's own")
def test_evictions_are_listed_with_their_reasons(small: Server) -> None:
    """Residency lists the latest evictions, the newest first, at most `limit`."""
    end_by_eviction(small)
    evicted = small.client().get("/v1/residency").json()["evicted"]
    assert len(evicted) > 2
    assert [row["at"] for row in evicted] == sorted((row["at"] for row in evicted), reverse=True)
    for row in evicted:
        assert row["at"].endswith("Z")
        assert (row["tenant"], row["for_tenant"], row["version"]) == ("races", "races", 1)
        assert row["adapter"].startswith("large-")
        assert row["tier"] in ("device", "host")
        assert row["reason"] in ("probation", "idle")
        assert row["nbytes"] >= LARGE_SIZE
    assert small.client().get("/v1/residency", params={"limit": 1}).json()["evicted"] == evicted[:1]
