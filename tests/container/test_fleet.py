"""The fleet of docker-compose.yml: the file is sound, and its services work together as the file says."""

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from prefix_service.settings import Settings
from prefix_service.system.sizes import parse_bytes
from tests.container.composed import ROOT, Composed, compose_file, of_the_image
from tests.missing import not_tested
from tests.pages.markdown import PACKAGE
from tests.processes import eventually

SCRIPTS = Path(sys.executable).parent
SCHEMA = ROOT / "tests" / "data" / "compose-spec.json"
ADAPTER = PACKAGE / "cli" / "demo" / "adapters" / "capitals-json"


def test_compose_meets_its_schema() -> None:
    """The file meets the schema of the compose specification."""
    document = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    jsonschema.Draft7Validator(json.loads(SCHEMA.read_text())).validate(document)


def test_compose_accepts_the_profile() -> None:
    """podman-compose reads all services of the profile."""
    podman_compose = SCRIPTS / "podman-compose"
    if shutil.which("podman") is None or not podman_compose.exists():
        not_tested("podman, or podman-compose from the extra `test`, is not installed")
    command: list[str | Path] = [podman_compose, "--file", ROOT / "docker-compose.yml", "--profile", "fleet", "config"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    services = yaml.safe_load(shown.stdout)["services"]
    assert services.keys() == compose_file()["services"].keys()


@pytest.mark.parametrize("name", compose_file()["services"])
def test_every_service_is_bounded(name: str) -> None:
    """Each has limits, gains no privileges, is checked, starts again, and comes from a pinned image."""
    service = compose_file()["services"][name]
    limits = service["deploy"]["resources"]["limits"]
    assert {"memory", "pids"} <= limits.keys()
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["restart"] == "unless-stopped"
    if service["image"] == "prefix-service":
        assert "healthcheck" not in service, "the image's own is inherited"
        own = {name.lower(): value for name, value in service.get("environment", {}).items()}
        names = ("device_bytes", "rendering_bytes", "work_bytes")
        budgets = [parse_bytes(own.get(f"prefix_{it}", str(Settings.model_fields[it].default))) for it in names]
        assert sum(budgets) + (1 << 29) < parse_bytes(limits["memory"].upper().replace("G", "GiB"))
    else:
        assert service["healthcheck"]["test"][0] == "CMD"
        assert service["image"].rpartition(":")[2][-1].isdigit(), "no tag that moves"
    for port in service.get("ports", []):
        assert port.startswith("127.0.0.1:"), "for this machine alone"


def test_secrets_are_files() -> None:
    """No value of the file is a secret: whoever has the file can start nothing that others use."""
    document = compose_file()
    for name, secret in document["secrets"].items():
        assert secret == {"file": f"./secrets/{name}"}
    assert "/secrets/" in (ROOT / ".gitignore").read_text().splitlines()
    known = set(of_the_image()[0]) | {f"PREFIX_{name.upper()}" for name in Settings.model_fields}
    for service in document["services"].values():
        given = service.get("environment", {})
        assert {name for name in given if name.startswith("PREFIX_")} <= known
        assert not [name for name in given if "PASSWORD" in name and not name.endswith("_FILE")]


def test_grafana_finds_what_it_shows() -> None:
    """Its data source is Prometheus' address, and its dashboards are where the file is mounted."""
    document = compose_file()
    contents = {name: yaml.safe_load(config["content"]) for name, config in document["configs"].items()}
    (source,) = contents["grafana-datasource"]["datasources"]
    assert source["url"] == "http://prometheus:9090"
    (provider,) = contents["grafana-dashboards"]["providers"]
    mounted = [volume.split(":")[1] for volume in document["services"]["grafana"]["volumes"]]
    assert f"{provider['options']['path']}/prefix-service.json" in mounted


@pytest.fixture(scope="module")
def fleet() -> Iterator[Composed]:
    """Yields all services of the profile but Grafana, as processes of this machine."""
    for program in ("unshare", "ip", "haproxy", "prometheus", "wget", "setpriv"):
        if shutil.which(program, path="/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin") is None:
            not_tested(f"{program} is not installed, or this is not Linux")
    # This is not pytest's folder, which is the owner's alone: PostgreSQL refuses to run as root.
    with tempfile.TemporaryDirectory(prefix="prefix-composed-") as folder:
        Path(folder).chmod(0o755)
        composed = Composed(Path(folder))
        with composed.started():
            yield composed


def test_the_fleet_serves(fleet: Composed) -> None:
    """Through HAProxy an adapter is published and fetched; three replicas know each other, and all have its bytes."""
    key = (fleet.data("replica-1") / "bootstrap.key").read_text().strip()
    way = {"PREFIX_URL": "http://haproxy:8080", "PREFIX_API_KEY": key}
    fleet.run("prefix-service", "publish", ADAPTER, "acme/capitals", **way)
    header = f"Authorization: Bearer {key}"

    def get(address: str) -> Any:
        return json.loads(fleet.run("curl", "-sSf", "-H", header, address))

    def listed() -> list[str]:
        return sorted(item["address"] for item in get("http://haproxy:8080/v1/replicas")["items"])

    names = [f"replica-{number}" for number in (1, 2, 3)]
    eventually(lambda: listed() == [f"http://{name}:8080" for name in names])
    bodies = set()
    for name in names:
        address = f"http://{name}:8080/v1/tenants/acme/adapters/capitals@1/prefix"
        fleet.run("curl", "-sSf", "-H", header, "--output", fleet.folder / name, address)
        bodies.add((fleet.folder / name).read_bytes())
        assert not (fleet.data(name) / "blobs").exists()
    assert len(bodies) == 1


def test_prometheus_sees_every_replica(fleet: Composed) -> None:
    """It knows where the numbers of all three are, and the rules of the alerts."""

    def get(path: str) -> Any:
        return json.loads(fleet.run("curl", "-sSf", f"http://prometheus:9090/api/v1/{path}"))["data"]

    def found() -> list[str]:
        return sorted(target["labels"]["instance"] for target in get("targets")["activeTargets"])

    eventually(lambda: found() == [f"replica-{number}:9090" for number in (1, 2, 3)])
    for name in ("replica-1", "replica-2", "replica-3"):
        assert "prefix_service_requests_total" in fleet.run("curl", "-sSf", f"http://{name}:9090/metrics")
    assert get("rules")["groups"][0]["rules"]


def test_no_secret_is_on_a_command_line(fleet: Composed) -> None:
    """Or in a log: they come from files, and stay with the processes that need them."""
    for name, process in fleet.processes.items():
        command = Path(f"/proc/{process.pid}/cmdline").read_text()
        log = fleet.log(name).read_text() if fleet.log(name).exists() else ""
        for secret in fleet.secrets.values():
            assert secret not in command + log
