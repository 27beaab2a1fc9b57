"""Each of the files to copy is read by the program that it is for, and names settings that exist."""

import configparser
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
import yaml

from prefix_service.client import PrefixClient
from prefix_service.settings import Settings, variable
from prefix_service.system.sizes import parse_bytes
from tests.benchmarks.speed.peers import started
from tests.client.forwarder import Forwarder, forwarders
from tests.conftest import Server, free_port
from tests.fleet.starting import haproxy_file, haproxy_program
from tests.missing import not_tested
from tests.pages.markdown import PACKAGE
from tests.pages.story import Story, network

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
    others = {"PREFIX_URL", "PREFIX_API_KEY", "PREFIX_IMAGE", "PREFIX_PUBLISH", "PREFIX_SERVICE_PORT", "PREFIX_"}
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
        file.write_text(text.replace("hash-balance-factor 150", ""))
        with started([program, "-db", "-f", str(file)], port):
            yield f"http://127.0.0.1:{port}", replicas


def test_haproxy_sends_all_of_an_adapter_to_one_replica(haproxy: tuple[str, list[Forwarder]], server: Server) -> None:
    """Its versions, forms, spellings and protocols; the next replica takes over where one has gone; changes pass."""
    url, replicas = haproxy
    names = [f"acme/h{number}" for number in range(6)]
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
    if shutil.which("systemd-analyze") is None:
        not_tested("systemd-analyze is missing: install systemd")
    file = tmp_path / "prefix-service.service"
    file.write_text(unit.replace("/opt/prefix-service/bin/prefix-service", "/bin/true"))
    done = subprocess.run(["systemd-analyze", "verify", file], capture_output=True, text=True)
    assert (done.returncode, [line for line in done.stderr.splitlines() if file.name in line]) == (0, [])


def _kubernetes() -> dict[str, dict[str, Any]]:
    documents = list(yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text()))
    return {document["kind"]: document for document in documents}


def test_the_objects_of_kubernetes() -> None:
    """The objects run one pod at a time on the volume, as the image's user, with right probes and budgets."""
    found = _kubernetes()
    deployment, service = found["Deployment"]["spec"], found["Service"]["spec"]
    pod = deployment["template"]["spec"]
    (container,) = pod["containers"]
    assert (deployment["replicas"], deployment["strategy"]) == (1, {"type": "Recreate"})
    assert service["selector"].items() <= deployment["template"]["metadata"]["labels"].items()
    assert pod["enableServiceLinks"] is False
    assert pod["terminationGracePeriodSeconds"] > 30
    assert pod["securityContext"]["runAsUser"] == 10001
    probes = {name: container[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "liveness", "readiness")}
    assert probes == {"startup": "/livez", "liveness": "/livez", "readiness": "/readyz"}
    claim = found["PersistentVolumeClaim"]["metadata"]["name"]
    assert {"name": "data", "persistentVolumeClaim": {"claimName": claim}} in pod["volumes"]
    assert {"name": "data", "mountPath": "/data"} in container["volumeMounts"]
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    limit = parse_bytes(container["resources"]["limits"]["memory"] + "B")
    assert sum(parse_bytes(value) for value in environment.values()) + (1 << 30) < limit


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
