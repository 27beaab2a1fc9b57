"""Each of the files to copy is read by the program that it is for, and names settings that exist."""

import configparser
import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import httpx
import kubernetes_validate
import pytest
import yaml

from prefix_service.client import PrefixClient
from prefix_service.settings import NOT_SETTINGS, Settings, variable
from prefix_service.system.sizes import parse_bytes
from tests.benchmarks.speed.peers import started
from tests.client.forwarder import Forwarder, forwarders
from tests.client.hostile import answer, hostile_server, read_request
from tests.conftest import Server, free_port
from tests.fleet.starting import haproxy_file, haproxy_program
from tests.missing import not_tested
from tests.pages.markdown import PACKAGE
from tests.pages.story import Story, network
from tests.processes import eventually

FOLDER: Final = PACKAGE / "deploy"
SETTINGS: Final = {variable(name) for name in Settings.model_fields}
NGINX: Final = """
daemon off;
user root;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{ }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    include {folder}/site.conf;
}}
"""
CASE: Final = "service/prefix_service/cli/demo/adapters/capitals-json"


@pytest.mark.parametrize("file", sorted(FOLDER.iterdir()), ids=lambda file: file.name)
def test_it_names_settings_that_exist(file: Path) -> None:
    """The files name no setting that the service would not read."""
    others = {*NOT_SETTINGS, "PREFIX_SERVICE_PORT", "PREFIX_"}
    assert set(re.findall(r"\bPREFIX_[A-Z_]*", file.read_text())) - others <= SETTINGS


@pytest.fixture
def haproxy(tmp_path: Path, server: Server) -> Iterator[tuple[str, list[Forwarder]]]:
    """Yields the URL of HAProxy with the file's configuration, and three addresses of the service behind it."""
    port = free_port()
    with forwarders(server.url, *[("127.0.0.1", 0)] * 3) as replicas:
        program, text = haproxy_program(), haproxy_file(port, [replica.port for replica in replicas])
        file = tmp_path / "haproxy.cfg"
        file.write_text(text)
        checked = subprocess.run([program, "-c", "-f", file], capture_output=True, text=True)
        assert (checked.returncode, "WARNING" in checked.stderr) == (0, False), checked.stderr
        # A request that HAProxy still counts a moment after its answer would send the next one to another replica.
        assert "hash-balance-factor 150" in text
        text = text.replace("hash-balance-factor 150", "")
        # Nor is a replica given up here that a slow machine lets miss a check: its adapters would go to another one.
        assert " fall 2 " in text
        file.write_text(text.replace(" fall 2 ", " fall 100 "))
        with started([program, "-db", "-f", str(file)], port):
            yield f"http://127.0.0.1:{port}", replicas


@pytest.fixture
def nginx(tmp_path: Path, server: Server) -> Iterator[tuple[str, list[Forwarder]]]:
    """Yields the URL of nginx with the file's configuration, and three addresses of the service behind it."""
    program = shutil.which("nginx", path="/usr/sbin:/usr/bin") or not_tested("nginx is not installed")
    port = free_port()
    site = re.sub("listen 443 ssl;|ssl_certificate.*", "", (FOLDER / "nginx.conf").read_text())
    site = site.replace("server_name", f"listen 127.0.0.1:{port}; server_name")
    with forwarders(server.url, *[("127.0.0.1", 0)] * 3) as replicas:
        (line,) = re.findall(r"server 127\.0\.0\.1:8080 .*;", site)
        lines = [line.replace(":8080", f":{replica.port}") for replica in replicas]
        (tmp_path / "site.conf").write_text(site.replace(line, "\n".join(lines)))
        (tmp_path / "proxy.conf").write_text(NGINX.format(folder=tmp_path))
        with started([program, "-p", str(tmp_path), "-c", str(tmp_path / "proxy.conf")], port):
            yield f"http://127.0.0.1:{port}", replicas


@pytest.mark.parametrize("proxy", ["haproxy", "nginx"])
def test_all_of_an_adapter_goes_to_one_replica(proxy: str, server: Server, request: pytest.FixtureRequest) -> None:
    """Its versions, forms, spellings and protocols; the next replica takes over where one has gone; changes pass."""
    url, replicas = request.getfixturevalue(proxy)
    names = [f"acme/{proxy}-{number}" for number in range(6)]
    with PrefixClient(server.url, server.admin_key) as direct:
        for name in names:
            direct.publish(name, CASE)

    def seen() -> list[list[bytes]]:
        found = [[head for head in each.heads if b"/adapters/" in head or b"/v2/" in head] for each in replicas]
        for each in replicas:
            each.heads = []
        return found

    homes = []
    with PrefixClient(url, server.admin_key) as client, httpx.Client(timeout=60) as plain:
        for name in names:
            seen()
            client.get(name)
            client.get(f"{name}@1", dtype="bfloat16")
            client.put_alias(name, "prod", 1)
            tenant, adapter = name.split("/")
            odd = f"{url}/v1/tenants/{tenant}/adapters/{adapter}%40prod/prefix"
            upgrade = {"Authorization": f"Bearer {server.admin_key}", "Upgrade": "h2c", "Connection": "Upgrade"}
            assert plain.get(odd, headers=upgrade).status_code == 200
            for model in (f"{tenant}/{adapter}", f"{tenant}%2F{adapter}/versions/1"):
                assert plain.get(f"{url}/v2/models/{model}", headers=upgrade).status_code == 200
            load = f"{url}/v2/repository/models/{tenant}/{adapter}/load"
            assert plain.post(load, headers=upgrade).status_code == 200
            heads = seen()
            assert sorted(map(len, heads)) == [0, 0, 7]
            homes.append(next(index for index, found in enumerate(heads) if found))
            assert not any(b"h2c" in head for head in heads[homes[-1]])
        replicas[homes[0]].leave()
        for name in names:
            assert client.get(name).version == 1
            client.put_alias(name, "prod", 1)


class Replica:
    """A replica that answers checks with `status`, or not at all, and sends one byte of an answer before it waits until
    it may go on."""

    def __init__(self) -> None:
        self.status: str | None = "200 OK"
        self.refused = 0  # checks
        self.has_begun, self.goes_on = threading.Event(), threading.Event()

    def serve(self, connection: socket.socket) -> None:
        """Serves one connection."""
        while request := read_request(connection):
            if b" /readyz " not in request:
                self.has_begun.set()
                connection.sendall(answer(b"whole")[:-4])
                self.goes_on.wait(60)
                connection.sendall(b"hole")
            elif self.status is None:
                self.goes_on.wait(60)
            else:
                connection.sendall(answer(b"", status=(said := self.status)))
                self.refused += said.startswith("503")


def test_what_a_replica_has_begun_is_finished_unless_it_is_silent(tmp_path: Path) -> None:
    """A replica that says that it is not ready gets nothing new, and an answer that has begun comes whole. One that
    answers no check is given up, with whatever it has begun."""
    one, two = Replica(), Replica()
    port, path = free_port(), "/v1/tenants/acme/adapters/a/prefix"
    with (
        hostile_server(one.serve) as first,
        hostile_server(two.serve) as second,
        ThreadPoolExecutor(2) as pool,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client,
    ):
        file = tmp_path / "haproxy.cfg"
        file.write_text(haproxy_file(port, [int(each.url.rpartition(":")[2]) for each in (first, second)]))
        with started([haproxy_program(), "-db", "-f", str(file)], port):
            begun = pool.submit(client.get, path)
            eventually(lambda: one.has_begun.is_set() or two.has_begun.is_set())
            home, other = (one, two) if one.has_begun.is_set() else (two, one)
            home.status = "503 Service Unavailable"
            eventually(lambda: home.refused >= 3)  # two suffice, and the next one shows that HAProxy has them
            given_up = pool.submit(client.get, path)
            assert other.has_begun.wait(60)
            home.goes_on.set()
            assert begun.result(60).content == b"whole"
            other.status = None
            with pytest.raises(httpx.RemoteProtocolError):
                given_up.result(60)
            other.goes_on.set()


def test_the_unit_of_systemd(tmp_path: Path) -> None:
    """systemd verifies the unit, which waits longer than the service takes to end."""
    unit = (FOLDER / "prefix-service.service").read_text()
    parsed = configparser.ConfigParser(strict=False, interpolation=None)
    parsed.optionxform = str  # type: ignore[assignment,method-assign]
    parsed.read_string(unit)
    service = parsed["Service"]
    assert service["ExecStart"] == "/opt/prefix-service/bin/prefix-service serve"
    assert service["Environment"] == f"PREFIX_DATA_DIR=/var/lib/{service['StateDirectory']}"
    assert int(service["TimeoutStopSec"]) > 30
    budgets = (Settings.model_fields[f"{name}_bytes"].default for name in ("device", "rendering", "work"))
    assert sum(budgets) + (1 << 30) < parse_bytes(service["MemoryMax"] + "iB")
    if shutil.which("systemd-analyze") is None:
        not_tested("systemd-analyze is missing: install systemd")
    file = tmp_path / "prefix-service.service"
    file.write_text(unit.replace("/opt/prefix-service/bin/prefix-service", "/bin/true"))
    done = subprocess.run(["systemd-analyze", "verify", file], capture_output=True, text=True)
    assert (done.returncode, [line for line in done.stderr.splitlines() if file.name in line]) == (0, [])


def _kubernetes(name: str) -> dict[str, dict[str, Any]]:
    """Returns the objects of a file by kind; of Services the one that has an address."""
    documents = list(yaml.safe_load_all((FOLDER / f"{name}.yaml").read_text()))
    return {document["kind"]: document for document in reversed(documents)}


OF_KUBERNETES: Final = ("kubernetes", "kubernetes-fleet")


@pytest.mark.parametrize("name", OF_KUBERNETES)
def test_kubernetes_knows_every_field(name: str) -> None:
    """Every object meets the schema of its kind, strictly: a field that is misspelt would be ignored."""
    for document in yaml.safe_load_all((FOLDER / f"{name}.yaml").read_text()):
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize("name", OF_KUBERNETES)
def test_the_pods_of_kubernetes(name: str) -> None:
    """They run as the image's user, with right probes, and with budgets that fit their memory."""
    found = _kubernetes(name)
    template = found["Deployment" if "Deployment" in found else "StatefulSet"]["spec"]["template"]
    pod, (container,) = template["spec"], template["spec"]["containers"]
    for kind in ("Service", "NetworkPolicy"):
        spec = found[kind]["spec"]
        chosen = spec["selector"] if kind == "Service" else spec["podSelector"]["matchLabels"]
        assert chosen.items() <= template["metadata"]["labels"].items()
    assert pod["enableServiceLinks"] is False
    assert pod["automountServiceAccountToken"] is False
    assert pod["terminationGracePeriodSeconds"] > 30
    assert pod["securityContext"]["runAsUser"] == 10001
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    probes = {name: container[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "liveness", "readiness")}
    assert probes == {"startup": "/livez", "liveness": "/livez", "readiness": "/readyz"}
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    used = [port["port"] for rule in found["NetworkPolicy"]["spec"]["ingress"] for port in rule["ports"]]
    assert set(used) == ports.keys()
    assert ports["http"] == found["Service"]["spec"]["ports"][0]["port"] == 8080
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts["data"] == "/data"
    volumes = {volume["name"] for volume in pod["volumes"]}
    volumes |= {
        claim["metadata"]["name"]
        for claim in found.get("StatefulSet", {}).get("spec", {}).get("volumeClaimTemplates", [])
    }
    assert mounts.keys() == volumes
    environment = {entry["name"]: entry.get("value", "") for entry in container["env"]}
    budgets = [environment[f"PREFIX_{kind}_BYTES"] for kind in ("DEVICE", "RENDERING", "WORK")]
    limits = container["resources"]["limits"]
    assert sum(map(parse_bytes, budgets)) + (1 << 30) < parse_bytes(limits["memory"] + "B")
    assert "cpu" in limits


def test_one_replica_on_kubernetes() -> None:
    """One pod at a time is on the volume."""
    found = _kubernetes("kubernetes")
    deployment = found["Deployment"]["spec"]
    assert (deployment["replicas"], deployment["strategy"]) == (1, {"type": "Recreate"})
    claim = found["PersistentVolumeClaim"]["metadata"]["name"]
    pod = deployment["template"]["spec"]
    assert {"name": "data", "persistentVolumeClaim": {"claimName": claim}} in pod["volumes"]


def test_a_fleet_on_kubernetes(tmp_path: Path) -> None:
    """Replicas have names that clients can use, and scale by requests in flight; the secrets are files, and the command
    that reads them ends in `serve`."""
    found = _kubernetes("kubernetes-fleet")
    documents = list(yaml.safe_load_all((FOLDER / "kubernetes-fleet.yaml").read_text()))
    stateful = found["StatefulSet"]["spec"]
    (headless,) = [it for it in documents if it["kind"] == "Service" and it["spec"].get("clusterIP") == "None"]
    assert stateful["serviceName"] == headless["metadata"]["name"]
    assert "replicas" not in stateful, "the autoscaler's"
    pod = stateful["template"]["spec"]
    (container,) = pod["containers"]
    environment = {entry["name"]: entry.get("value", "") for entry in container["env"]}
    assert environment["PREFIX_ADVERTISE"] == f"http://$(POD_NAME).{stateful['serviceName']}:8080"
    assert found["PodDisruptionBudget"]["spec"]["maxUnavailable"] == 1
    scaler = found["HorizontalPodAutoscaler"]["spec"]
    assert scaler["scaleTargetRef"]["name"] == found["StatefulSet"]["metadata"]["name"]
    metric = scaler["metrics"][0]["pods"]
    assert metric["metric"]["name"] == "prefix_service_requests_in_flight"
    assert int(metric["target"]["averageValue"]) < Settings.model_fields["max_in_flight"].default
    claim = stateful["volumeClaimTemplates"][0]["spec"]["resources"]["requests"]["storage"]
    assert parse_bytes(environment["PREFIX_BLOB_CACHE_BYTES"]) < parse_bytes(claim + "B")
    (mount,) = [it["mountPath"] for it in container["volumeMounts"] if it["name"] == "secrets"]
    assert Path(environment["PREFIX_KEY_SECRET_FILE"]).parent == Path(mount)
    (tmp_path / "prefix-service").write_text(
        '#!/bin/sh\necho "$@ $PGPASSWORD $AWS_ACCESS_KEY_ID $AWS_SECRET_ACCESS_KEY"\n'
    )
    (tmp_path / "prefix-service").chmod(0o755)
    for name in ("PGPASSWORD", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        (tmp_path / name).write_text(f"of {name}\n")
    words = [word.replace(f"{mount}/", f"{tmp_path}/") for word in [*container["command"], *container["args"]]]
    done = subprocess.run(words, env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, capture_output=True, text=True, check=True)
    assert done.stdout == "serve of PGPASSWORD of AWS_ACCESS_KEY_ID of AWS_SECRET_ACCESS_KEY\n"


def test_the_metric_of_the_autoscaler(server: Server) -> None:
    """The service counts requests in flight under the name that the files have."""
    assert "\nprefix_service_requests_in_flight " in server.client().get("/metrics").text


@pytest.fixture(scope="module")
def behind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    """Yields a service that nginx serves with the file's configuration, and a certificate of ours."""
    if shutil.which("nginx", path="/usr/sbin:/usr/bin") is None or shutil.which("openssl") is None:
        not_tested("nginx or openssl is missing: install nginx-light and openssl")
    folder = tmp_path_factory.mktemp("nginx")
    subject = ["-subj", "/CN=prefix.example.com", "-addext", "subjectAltName=DNS:prefix.example.com"]
    files = ["-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")]
    new = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"]
    subprocess.run([*new, *files, *subject], check=True, capture_output=True)
    site = (FOLDER / "nginx.conf").read_text()
    for path, file in re.findall(r"(/etc/ssl/\w+/prefix\.example\.com\.(\w+))", site):
        site = site.replace(path, str(folder / ("cert.pem" if file == "pem" else "key.pem")))
    # Another port too: the browser's address has it then, and the page's own Origin.
    (folder / "site.conf").write_text(site.replace("listen 443 ssl;", "listen 443 ssl; listen 8443 ssl;"))
    (folder / "proxy.conf").write_text(NGINX.format(folder=folder))
    with network() as namespace:
        story = Story(tmp_path_factory.mktemp("behind"), namespace, {})
        environment = {**story.environment, "PATH": f"{story.environment['PATH']}:/usr/sbin"}
        commands = (["prefix-service", "serve"], ["nginx", "-p", str(folder), "-c", str(folder / "proxy.conf")])
        running = []
        for command in commands:
            program = shutil.which(command[0], path=environment["PATH"]) or command[0]
            running.append(subprocess.Popen([*namespace, program, *command[1:]], cwd=story.folder, env=environment))
        try:
            story.sh(
                f"curl -sf --retry 60 --retry-all-errors --retry-delay 1 --cacert {folder / 'cert.pem'} "
                "--resolve prefix.example.com:443:127.0.0.1 https://prefix.example.com/readyz\n"
                f"export CERTIFICATE={folder / 'cert.pem'} PREFIX_API_KEY=$(cat data/bootstrap.key)"
            )
            yield story
        finally:
            for process in running:
                process.terminate()
            for process in running:
                process.wait(timeout=90)


def test_an_adapter_passes_nginx(behind: Story) -> None:
    """nginx passes an upload above its default limit, and its prefix, over TLS with the file's configuration."""
    (behind.folder / "large.py").write_text(
        "import json, pathlib, torch\n"
        "from safetensors.torch import save_file\n"
        "folder = pathlib.Path('large'); folder.mkdir()\n"
        "config = {'peft_type': 'PREFIX_TUNING', 'num_virtual_tokens': 64, 'num_layers': 4, 'num_attention_heads': 8,\n"
        "          'token_dim': 1024, 'inference_mode': True}\n"
        "(folder / 'adapter_config.json').write_text(json.dumps(config))\n"
        "save_file({'prompt_embeddings': torch.randn(64, 8192)}, folder / 'adapter_model.safetensors')\n"
    )
    behind.python((behind.folder / "large.py").read_text())
    assert (behind.folder / "large" / "adapter_model.safetensors").stat().st_size > 2 << 20
    common = (
        "curl -sSf --cacert $CERTIFICATE --resolve prefix.example.com:443:127.0.0.1 "
        '-H "Authorization: Bearer $PREFIX_API_KEY" https://prefix.example.com/v1/tenants/acme/adapters/large'
    )
    form = " ".join(f"-F {name}=@large/{name}" for name in ("adapter_config.json", "adapter_model.safetensors"))
    behind.sh(f"{common}/versions {form}\n{common}@1/prefix?batch_size=4 -o prefix.safetensors")
    assert (behind.folder / "prefix.safetensors").stat().st_size > 8 << 20


def test_signing_in_through_nginx_on_another_port(behind: Story) -> None:
    """The page's Origin is the address that the service sees."""
    behind.sh(
        "curl -sSf --cacert $CERTIFICATE --resolve prefix.example.com:8443:127.0.0.1 -H 'X-Prefix-CSRF: 1' "
        "-H 'Origin: https://prefix.example.com:8443' --json '{\"key\": \"'$PREFIX_API_KEY'\"}' "
        "https://prefix.example.com:8443/ui/session"
    )
