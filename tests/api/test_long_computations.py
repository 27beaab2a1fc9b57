"""Long computations of some tenants never make another's short work wait for a whole one."""

import itertools
import json
import re
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.api.helpers import CONFIG, head, upload, versions_path, weights
from tests.conftest import Server, running_server

# An MLP of about 200 GFLOP, 32 blocks of rows: three seconds of one core.
LONG: dict[str, Any] = {
    "peft_type": "PREFIX_TUNING",
    "task_type": "CAUSAL_LM",
    "num_virtual_tokens": 65_536,
    "token_dim": 64,
    "num_attention_heads": 2,
    "num_layers": 1,
    "encoder_hidden_size": 8192,
    "prefix_projection": True,
}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """Yields a server whose computations use one core each."""
    with running_server(tmp_path / "data", environment={"OMP_NUM_THREADS": "1"}) as running:
        yield running


def seconds(call: Callable[[], httpx.Response]) -> float:
    """Returns how long a successful request takes."""
    began = time.monotonic()
    assert call().is_success
    return time.monotonic() - began


def test_long_computations_do_not_delay_a_neighbours_short_work(server: Server) -> None:
    """While two tenants make untrained prefixes, a neighbour's masks and publications take a part of that time."""
    admin, seeds = server.client(), itertools.count(1)
    for tenant in ("first", "second", "neighbour"):
        upload(admin, tenant, "small", file=weights())

    def make(tenant: str) -> None:
        body = {"config": LONG}
        answer = server.client().post(versions_path(tenant, "long"), json=body, timeout=300)
        assert answer.status_code == 201, answer.text

    def mask() -> httpx.Response:
        body = {"attention_mask": [[1, 1, 1]]}
        return admin.post("/v1/tenants/neighbour/adapters/small@1/prefix", json=body, timeout=300)

    def publish() -> httpx.Response:
        body = {"config": CONFIG, "seed": next(seeds)}
        return admin.post(versions_path("neighbour", "other"), json=body, timeout=300)

    assert mask().status_code == publish().status_code - 1 == 200
    alone = min(seconds(call) for call in (mask, publish) * 3)
    masks, publications = list[float](), list[float]()
    with ThreadPoolExecutor(2) as pool:
        began = time.monotonic()
        making = [pool.submit(make, tenant) for tenant in ("first", "second")]
        while not any(one.done() for one in making):
            masks.append(seconds(mask))
            publications.append(seconds(publish))
        took = time.monotonic() - began
        for one in making:
            one.result()
    assert took > 10 * alone, "the computations were too short to delay anybody"
    assert statistics.median(masks) < took / 5
    assert statistics.median(publications) < took / 3


def test_a_computation_ends_when_its_client_leaves(server: Server) -> None:
    """After the client leaves, a computation of twelve seconds ends with its current step, and its memory is free."""
    admin, body = server.client(), json.dumps({"config": {**LONG, "token_dim": 256}}).encode()
    upload(admin, "acme", "small", file=weights())
    used = re.compile(r"^prefix_service_work_used_bytes ([0-9.e+]+)$", re.MULTILINE)

    def until(*, is_used: bool) -> None:
        while (found := used.search(admin.get("/metrics").text)) is None or (float(found[1]) > 0) is not is_used:
            assert time.monotonic() - began < 120
            time.sleep(0.05)

    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as client:
        fields = {"Authorization": f"Bearer {server.admin_key}", "Content_Type": "application/json"}
        client.sendall(head("POST", versions_path("acme", "long"), Content_Length=str(len(body)), **fields) + body)
        began = time.monotonic()
        until(is_used=True)
    began = time.monotonic()
    until(is_used=False)
    assert admin.get("/v1/tenants/acme/adapters/long/versions").status_code == 404
