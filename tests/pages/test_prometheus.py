"""What Prometheus and Grafana get: Prometheus itself reads the files, and every query is run on a real scrape."""

import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
import yaml

from prefix_service.registry.registry import LEAST
from prefix_service.settings import Settings
from tests.api.helpers import CONFIG, upload
from tests.conftest import Server, free_port, running_server
from tests.missing import not_tested
from tests.pages.markdown import PACKAGE

FOLDER: Final = PACKAGE / "deploy"
SCRAPE: Final[dict[str, Any]] = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
ALERTS: Final[list[dict[str, Any]]] = yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"][0]["rules"]
PANELS: Final[list[dict[str, Any]]] = [
    panel for panel in json.loads((FOLDER / "grafana.json").read_text())["panels"] if panel["type"] != "row"
]
QUERIES: Final = [(panel["title"], target["expr"]) for panel in PANELS for target in panel["targets"]]
OF_PREFIXES: Final = 'job="prefix-service",instance="a",route="/v1/tenants/{tenant}/adapters/{ref}/prefix"'
FIRING: Final[dict[str, dict[str, str]]] = {
    "PrefixServiceDown": {'up{job="prefix-service",instance="a"}': "0x120"},
    "PrefixServiceNotReady": {
        'prefix_service_requests_total{job="prefix-service",instance="a",route="/readyz",status="503"}': "0+9x120"
    },
    "PrefixServiceDefects": {f'prefix_service_requests_total{{{OF_PREFIXES},status="500"}}': "0+1x120"},
    "PrefixServiceOverloaded": {
        f'prefix_service_requests_total{{{OF_PREFIXES},status="503"}}': "0+10x120",
        f'prefix_service_requests_total{{{OF_PREFIXES},status="200"}}': "0+90x120",
    },
    "PrefixServiceSlow": {
        f'prefix_service_request_seconds_bucket{{{OF_PREFIXES},outcome="2xx",le="5"}}': "0+9x120",
        f'prefix_service_request_seconds_bucket{{{OF_PREFIXES},outcome="2xx",le="10"}}': "0+10x120",
        f'prefix_service_request_seconds_bucket{{{OF_PREFIXES},outcome="2xx",le="+Inf"}}': "0+10x120",
    },
    "PrefixServiceLoadsFail": {
        'prefix_service_loads_total{job="prefix-service",instance="a",tier="device",outcome="failed"}': "0+1x120"
    },
    "PrefixServiceMemoryTooSmall": {
        'prefix_service_lookups_total{job="prefix-service",instance="a",tier="device",result="hit"}': "0+50x120",
        'prefix_service_lookups_total{job="prefix-service",instance="a",tier="device",result="miss"}': "0+50x120",
        'prefix_service_evictions_total{job="prefix-service",instance="a",tier="device"}': "0+50x120",
    },
    "PrefixServicePinned": {
        'prefix_service_residency_pinned_bytes{job="prefix-service",instance="a",tier="device"}': "48x120",
        'prefix_service_residency_budget_bytes{job="prefix-service",instance="a",tier="device"}': "100x120",
    },
    "PrefixServiceWrongKeys": {'prefix_service_refused_keys_total{job="prefix-service",instance="a"}': "0+600x120"},
}
"""Series, a sample a minute, with which each alert fires after two hours, and no other does."""


def _promtool(*arguments: str | Path) -> None:
    program = shutil.which("promtool")
    if program is None:
        not_tested("promtool is missing: install prometheus")
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_scrape(tmp_path: Path) -> None:
    """The port that the service has by default, with a key; Prometheus takes the file as it is."""
    (scrape,) = SCRAPE["scrape_configs"]
    assert scrape["static_configs"] == [{"targets": [f"127.0.0.1:{Settings.model_fields['port'].default}"]}]
    assert scrape["authorization"].keys() == {"credentials_file"}
    (tmp_path / "key").touch()
    text = (FOLDER / "prometheus.yml").read_text()
    for path, file in (("prefix-service.key", tmp_path / "key"), ("prefix-service-alerts.yml", FOLDER / "alerts.yml")):
        text = text.replace(f"/etc/prometheus/{path}", str(file))
    (tmp_path / "prometheus.yml").write_text(text)
    _promtool("check", "config", "--lint-fatal", tmp_path / "prometheus.yml")


def test_each_alert_fires(tmp_path: Path) -> None:
    """With numbers that it is for, and no other alert does. Each says what is wrong, and what to do."""
    assert {rule["alert"] for rule in ALERTS} == FIRING.keys()
    tests = []
    for alert, series in FIRING.items():
        (rule,) = (rule for rule in ALERTS if rule["alert"] == alert)
        assert rule["annotations"].keys() == {"summary", "description"}
        others = [
            {"eval_time": "2h", "alertname": other["alert"], "exp_alerts": []} for other in ALERTS if other is not rule
        ]
        values = [{"series": name, "values": sequence} for name, sequence in series.items()]
        firing = {"expr": f'count(ALERTS{{alertname="{alert}",alertstate="firing"}})', "eval_time": "2h"}
        fires = {**firing, "exp_samples": [{"labels": "{}", "value": 1}]}
        tests.append({"interval": "1m", "input_series": values, "alert_rule_test": others, "promql_expr_test": [fires]})
    document = {"rule_files": [str(FOLDER / "alerts.yml")], "evaluation_interval": "1m", "tests": tests}
    (tmp_path / "tests.yml").write_text(yaml.safe_dump(document))
    _promtool("test", "rules", tmp_path / "tests.yml")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A service in which all that is counted happens: it has room for one prefix, and none for a large one."""
    budgets = dict.fromkeys(("PREFIX_DEVICE_BYTES", "PREFIX_RENDERING_BYTES"), str(5 * LEAST // 2))
    with running_server(tmp_path_factory.mktemp("scraped") / "data", environment=budgets) as server:
        for name in ("a", "b"):
            assert upload(server.client(), "acme", name).status_code == 201
        large = {"config": {**CONFIG, "num_virtual_tokens": 256}, "seed": 0}
        assert server.client().post("/v1/tenants/acme/adapters/large/versions", json=large).status_code == 201
        yield server


def _use(server: Server) -> None:
    client = server.client()
    for name in ("a", "b", "none", "large"):
        client.get(f"/v1/tenants/acme/adapters/{name}/prefix")


@pytest.fixture(scope="module")
def prometheus(service: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """Prometheus with our configuration and alerts; only the address, the key's file and the pace are others."""
    program = shutil.which("prometheus")
    if program is None:
        not_tested("prometheus is missing: install it")
    folder = tmp_path_factory.mktemp("prometheus")
    (folder / "key").write_text(service.client().post("/v1/keys", json={"scope": "metrics"}).json()["key"])
    document = {**SCRAPE, "global": {"scrape_interval": "1s", "evaluation_interval": "1s"}}
    (scrape,) = document["scrape_configs"]
    address = {"static_configs": [{"targets": [service.url.partition("//")[2]]}]}
    own = {**scrape, **address, "authorization": {"credentials_file": str(folder / "key")}}
    document |= {"scrape_configs": [own], "rule_files": [str(FOLDER / "alerts.yml")]}
    (folder / "prometheus.yml").write_text(yaml.safe_dump(document))
    port = free_port()
    command = [program, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command, f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"], stdout=log, stderr=log
        )
    with httpx.Client(
        base_url=f"http://127.0.0.1:{port}", transport=httpx.HTTPTransport(retries=0), timeout=60
    ) as client:
        try:
            yield client
        finally:
            process.terminate()
            process.wait(timeout=60)


def _run(prometheus: httpx.Client, query: str) -> list[dict[str, Any]]:
    """The result of a query, with what Grafana replaces in it."""
    query = query.replace("$__rate_interval", "30s").replace("$job", "prefix-service")
    try:
        answer = prometheus.get("/api/v1/query", params={"query": query})
    except httpx.TransportError:  # it has only just been started
        return []
    assert answer.status_code in (200, 503), answer.text
    found: list[dict[str, Any]] = answer.json()["data"]["result"] if answer.status_code == 200 else []
    return found


def test_every_panel_shows_something(service: Server, prometheus: httpx.Client) -> None:
    """Each of its queries has a result on a real scrape, with a key of scope `metrics`."""
    until = time.monotonic() + 90
    missing = dict.fromkeys(QUERIES)
    while missing and time.monotonic() < until:
        _use(service)
        time.sleep(0.5)
        missing = dict.fromkeys(one for one in missing if not _run(prometheus, one[1]))
    assert list(missing) == []
    assert _run(prometheus, 'ALERTS{alertstate="firing"}') == []


def test_every_number_exists(service: Server) -> None:
    """No alert and no panel asks for what the service does not count."""
    names = set(re.findall(r"prefix_service_\w+", "".join([*(q for _, q in QUERIES), *(r["expr"] for r in ALERTS)])))
    _use(service)
    text = service.client().get("/metrics").text
    assert {name for name in names if not re.search(rf"^{name}[{{ ]", text, re.MULTILINE)} == set()


@pytest.mark.parametrize("file", ["grafana.json", "grafana-vllm.json"])
def test_the_dashboard(file: str) -> None:
    """Panels have their own place and id, and say what they show."""
    panels = [panel for panel in json.loads((FOLDER / file).read_text())["panels"] if panel["type"] != "row"]
    places = [panel["gridPos"] for panel in panels]
    cells = [(place["x"] + x, place["y"] + y) for place in places for x in range(place["w"]) for y in range(place["h"])]
    assert len(set(cells)) == len(cells)
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["description"]
        assert {target["datasource"]["uid"] for target in panel["targets"]} == {"${datasource}"}
