"""The fleet that other tests use: three replicas behind HAProxy."""

import time
from concurrent.futures import ThreadPoolExecutor

import httpx

from tests.api.helpers import tensors_of, upload
from tests.fleet.starting import Fleet
from tests.processes import eventually


def status(client: httpx.Client, path: str) -> int | None:
    """Returns the status of an answer; None if nobody answers any more."""
    try:
        return client.get(path).status_code
    except httpx.TransportError:
        return None


def test_each_replica_serves_what_came_through_haproxy(whole_fleet: Fleet) -> None:
    """Also after it was replaced; HAProxy notices that it is away, and that it is back. A replica that ends says so,
    and answers until two checks of HAProxy have asked."""
    proxy = whole_fleet.client()
    published = upload(proxy, "acme", "whole")
    assert published.status_code == 201, published.text
    revision = {"Prefix-Min-Revision": published.headers["Prefix-Revision"]}
    began = time.monotonic()
    with ThreadPoolExecutor(1) as pool, httpx.Client(base_url=whole_fleet.servers[1].url, timeout=60) as ending:
        ended = pool.submit(whole_fleet.stop, 1)
        eventually(lambda: status(ending, "/readyz") in (503, None))
        time.sleep(2)
        # It answers for three seconds; a slow machine may ask too late.
        assert status(ending, "/livez") == 200 or time.monotonic() - began > 3
        ended.result(90)
    assert len(whole_fleet.servers) == 2
    assert proxy.get("/v1/tenants/acme/adapters/whole/prefix").status_code == 200
    whole_fleet.start(1)
    for server in whole_fleet.servers.values():
        answer = server.client(whole_fleet.admin_key).get("/v1/tenants/acme/adapters/whole/prefix", headers=revision)
        tensors_of(answer)
    eventually(lambda: len(proxy.get("/v1/replicas").json()["items"]) == 3)
