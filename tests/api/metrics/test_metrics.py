"""`GET /metrics` has the service's numbers for Prometheus, of one process or of several."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path

import httpx
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from prefix_service.api.metrics.metrics import Metrics
from prefix_service.registry.admission import AdmissionReport, Refusal
from prefix_service.registry.report import TierReport
from tests.api.helpers import problem, upload, weights
from tests.conftest import Server, free_port, running_server
from tests.forked import run_forked
from tests.processes import workers_of

PREFIX = "/v1/tenants/acme/adapters/a/prefix"
ROUTE = "/v1/tenants/{tenant}/adapters/{ref}/prefix"


def numbers(text: str) -> dict[str, float]:
    """Returns samples by name and by labels in the order of their names: `requests_total GET /livez 200`."""
    return {
        " ".join(
            [sample.name.removeprefix("prefix_service_"), *(sample.labels[name] for name in sorted(sample.labels))]
        ): (sample.value)
        for family in parse(text)
        for sample in family.samples
    }


def scraped(client: httpx.Client) -> dict[str, float]:
    """Returns the samples of a scrape."""
    answer = client.get("/metrics")
    assert answer.status_code == 200, answer.text
    return numbers(answer.text)


@pytest.fixture(scope="module")
def port() -> int:
    """Returns the port on which the metrics need no key."""
    return free_port()


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory, port: int) -> Iterator[Server]:
    """Yields a service whose numbers no other suite changes, with one adapter."""
    environment = {"PREFIX_METRICS_PORT": str(port)}
    with running_server(tmp_path_factory.mktemp("metrics") / "data", environment=environment) as running:
        assert upload(running.client(), "acme", "a").status_code == 201
        yield running


def test_they_need_a_key_of_the_platform(own: Server) -> None:
    """A platform's key of any scope reads the metrics, and a tenant's key does not."""
    admin = own.client()
    for scope in ("read", "write", "admin"):
        key = admin.post("/v1/keys", json={"scope": scope}).json()["key"]
        assert own.client(key).get("/metrics").status_code == 200
        key = admin.post("/v1/tenants/acme/keys", json={"scope": scope}).json()["key"]
        problem(own.client(key).get("/metrics"), 403, "forbidden")
    problem(own.client("").get("/metrics"), 401, "unauthenticated")


def test_requests_are_counted_by_route_method_and_status(own: Server) -> None:
    """Requests count with their seconds and bytes; one without a route has `none`."""
    client = own.client()
    before = scraped(client)
    size = sum(len(client.get(PREFIX).content) for _ in range(3))
    client.get("/v1/tenants/acme/adapters/b/prefix")
    client.get("/nowhere")
    after = scraped(client)
    rise = {name: value - before.get(name, 0) for name, value in after.items()}
    assert rise[f"requests_total GET {ROUTE} 200"] == 3
    assert rise[f"requests_total GET {ROUTE} 404"] == 1
    assert rise["requests_total GET none 404"] == 1
    assert rise[f"request_seconds_count 2xx {ROUTE}"] == 3
    assert 0 < rise[f"request_seconds_sum 2xx {ROUTE}"] < 10
    assert rise[f"request_seconds_bucket +Inf 2xx {ROUTE}"] == 3
    assert rise[f"request_seconds_count 4xx {ROUTE}"] == 1
    assert size <= rise[f"sent_bytes_total {ROUTE}"] < size + 500  # and the problem document
    assert after["requests_in_flight"] == 1  # the scrape itself


def test_refused_keys_are_counted(own: Server) -> None:
    """Refused keys are counted, so that somebody who tries keys is noticed."""
    client = own.client()
    before = scraped(client)["refused_keys_total"]
    own_key = client.headers["authorization"].removeprefix("Bearer ")
    for key in ("", "x", own_key[:-1] + ("1" if own_key.endswith("0") else "0")):
        own.client(key).get(PREFIX)
    assert scraped(client)["refused_keys_total"] == before + 3


def test_tiers(own: Server) -> None:
    """A scrape has each tier's bytes, budget, lookups and loads, as the registry reports them at that moment."""
    client = own.client()
    upload(client, "acme", "t", file=weights(5))
    before = scraped(client)
    client.put("/v1/tenants/acme/adapters/t/residency", json={"pinned": True})
    for _ in range(3):
        client.get("/v1/tenants/acme/adapters/t/prefix")
    after = scraped(client)
    rise = {name: value - before.get(name, 0) for name, value in after.items()}
    tiers = [name.partition(" ")[2] for name in after if name.startswith("residency_entries ")]
    device, host = sorted(tiers, key=lambda tier: tier.split()[-1])
    assert after[f"residency_budget_bytes {device}"] == 4 << 30
    assert after[f"residency_budget_bytes {host}"] == 2 << 30
    for tier in tiers:
        assert rise[f"residency_entries {tier}"] == 1
        assert rise[f"residency_used_bytes {tier}"] >= 96 * 4
        assert after[f"residency_used_bytes {tier}"] <= after[f"residency_budget_bytes {tier}"]
        assert (after[f"residency_readers {tier}"], after[f"residency_loading {tier}"]) == (0, 0)
        assert rise[f"loads_total ok {tier}"] == 1
        assert rise[f"loads_total failed {tier}"] == 0
        assert rise[f"load_seconds_total {tier}"] > 0
        assert rise[f"evictions_total {tier}"] == 0
    assert rise[f"residency_pinned_bytes {device}"] == rise[f"residency_used_bytes {device}"]
    lookups = {name: value for name, value in rise.items() if name.startswith("lookups_total") and value}
    place, tier = host.split()
    assert (lookups[f"lookups_total {place} hit {tier}"], lookups[f"lookups_total {place} miss {tier}"]) == (2, 1)


def _report(place: str, hits: int, used: int, failures: int) -> TierReport:
    """Returns the report of a device's tier in which nothing else has happened."""
    nothing = [0] * (len(fields(TierReport)) - 2)
    return replace(TierReport("device", place, *nothing), hits=hits, used=used, failures=failures)


async def test_counts_since_the_start_become_increments() -> None:
    """Repeated sampling changes nothing, and devices are counted apart."""
    metrics = Metrics()
    reports = [_report("cuda:0", hits=3, used=5, failures=0), _report("cuda:1", hits=7, used=0, failures=1)]
    refused: list[dict[Refusal, int]] = [{"requests": 5, "size": 0, "memory": 1}]
    metrics.watch(lambda: reports, lambda: AdmissionReport(100, 30, 2, refused[0]))
    for _ in range(3):
        metrics.sample()
    reports[0] = _report("cuda:0", hits=4, used=2, failures=0)
    refused[0] = {"requests": 6, "size": 0, "memory": 1}
    metrics.sample()
    found = numbers((await metrics.exposition(""))[0].decode())
    assert found["lookups_total cuda:0 hit device"] == 4
    assert found["lookups_total cuda:1 hit device"] == 7
    assert found["residency_used_bytes cuda:0 device"] == 2
    assert found["loads_total failed cuda:1 device"] == 1
    assert [found[f"refusals_total {kind}"] for kind in ("requests", "size", "memory")] == [6, 0, 1]
    assert [found[f"work_{name}"] for name in ("budget_bytes", "used_bytes", "waiting_jobs")] == [100, 30, 2]


async def test_no_metric_is_global() -> None:
    """Two apps in one process have their own counts."""
    one, other = Metrics(), Metrics()
    one.count("/livez", "GET", 200, 0.1, 1)
    assert "requests_total GET /livez 200" in numbers((await one.exposition(""))[0].decode())
    assert "requests_total GET /livez 200" not in numbers((await other.exposition(""))[0].decode())


def test_formats(own: Server) -> None:
    """A scrape is Prometheus' text, or OpenMetrics if that is accepted; a malformed `Accept` gets the text."""
    client = own.client()
    plain = client.get("/metrics", headers={"Accept": "*/*"})
    assert plain.headers["content-type"].startswith("text/plain; version=0.0.4")
    wanted = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"
    other = client.get("/metrics", headers={"Accept": wanted})
    assert other.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    names = {family.name for family in parse_openmetrics(other.text)}  # type: ignore[no-untyped-call]
    assert {"prefix_service_requests", "prefix_service_request_seconds", "prefix_service_evictions"} <= names
    for nonsense in ("application/openmetrics-text; version=x", "text/plain;version=1.x", "application/json", "é;="):
        answer = client.get("/metrics", headers={b"Accept": nonsense.encode()})
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/plain")


def test_a_port_of_their_own_needs_no_key(own: Server, port: int) -> None:
    """The metrics port, on a network that callers do not reach, needs no key; the main port does."""
    own.client().get(PREFIX)
    text = httpx.get(f"http://127.0.0.1:{port}/metrics").text
    found = numbers(text)
    assert found[f"requests_total GET {ROUTE} 200"] >= 1
    assert own.admin_key.split("_")[2] not in text
    assert httpx.get(f"{own.url}/metrics").status_code == 401


@pytest.mark.usefixtures("own")
def test_a_port_that_is_taken_is_told(tmp_path: Path, port: int) -> None:
    """The service refuses a taken metrics port before it serves anything."""
    arguments = ("serve", "--data-dir", tmp_path, "--port", str(free_port()))
    refused = run_forked(*arguments, environment={"PREFIX_METRICS_PORT": str(port)})
    assert refused.returncode == 1
    assert f"metrics cannot be served on 127.0.0.1:{port}" in refused.stderr


def test_a_scrape_tells_the_whole_service(tmp_path: Path) -> None:
    """With `--workers 2` each process reports the same counts, even after one was killed and replaced; the folder of
    the numbers does not grow, and is removed in the end.
    """
    environment = {"PREFIX_METRICS_PORT": str(free_port()), "TMPDIR": str(tmp_path)}
    with running_server(tmp_path / "data", "--workers", "2", environment=environment) as server:
        admin = server.client()
        assert upload(admin, "acme", "a").status_code == 201
        counter = f"requests_total GET {ROUTE} 200"
        _fetch(server, 40)
        _expect(server, counter, 40)
        own_port = httpx.get(f"http://127.0.0.1:{environment['PREFIX_METRICS_PORT']}/metrics")
        assert numbers(own_port.text)[counter] == 40
        (folder,) = tmp_path.glob("prefix-service-metrics-*")
        _until(lambda: (folder / "1.lock").exists() and sum(map(_counts, workers_of(server.process.pid))) == 2)
        files = _files(folder)
        killed = workers_of(server.process.pid)[0]
        os.kill(killed, signal.SIGKILL)
        _until(
            lambda: (
                killed not in workers_of(server.process.pid) and sum(map(_counts, workers_of(server.process.pid))) == 2
            )
        )
        _fetch(server, 10)
        _expect(server, counter, 50)
        assert _files(folder) >= files
        assert _files(folder) <= _files_of_two(files)
        assert scraped(server.client())["requests_in_flight"] >= 1
        ended = workers_of(server.process.pid)[0]
        kept = [tmp_path / file.name for file in folder.glob("gauge_livesum_*")]
        for link in kept:
            link.hardlink_to(folder / link.name)
        os.kill(ended, signal.SIGTERM)  # in order: what it held is not the service's any more
        _until(lambda: sorted(link.stat().st_nlink for link in kept) == [1, 2])  # its file is another's, or gone
        _until(lambda: ended not in workers_of(server.process.pid) and len(list(folder.glob("gauge_livesum_*"))) == 2)
        _expect(server, counter, 50)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=90) == 0
    assert list(tmp_path.glob("prefix-service-metrics-*")) == []
    lines = [json.loads(line) for line in server.log.read_text().splitlines()]  # from every process, in one form
    assert sum(line.get("route") == ROUTE and line["status"] == 200 for line in lines) == 50


def _files(folder: Path) -> set[str]:
    """Returns the names in a folder but for those of the live numbers, of which each minute has its own."""
    return {path.name for path in folder.iterdir() if not path.name.startswith("live-")}


def _files_of_two(files: set[str]) -> set[str]:
    """Returns the names that both workers could have: a kind of numbers has a file once a worker has counted one."""
    return {name.replace(f"{found}.", f"{worker}.") for name in files for found in (0, 1) for worker in (0, 1)}


def _counts(worker: int) -> bool:
    """Returns whether a process has begun to keep numbers."""
    return "gauge_livesum" in Path(f"/proc/{worker}/maps").read_text()


def _fetch(server: Server, times: int) -> None:
    """Fetches each time on a new connection, so that both processes answer."""
    for _ in range(times):
        until = time.monotonic() + 90  # another worker imports torch, beside the tests of other processes
        while True:
            try:
                assert server.client().get(PREFIX).status_code == 200
                break
            except httpx.TransportError:  # the process that was killed had accepted it
                assert time.monotonic() < until


def _expect(server: Server, counter: str, value: float) -> None:
    """Checks that twelve scrapes, on twelve connections, report this value."""
    _until(lambda: scraped(server.client())[counter] == value)
    assert {scraped(server.client())[counter] for _ in range(12)} == {value}


def _until(holds: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.1)
