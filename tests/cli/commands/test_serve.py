"""`serve` and `openapi` as an operator runs them."""

import json
import os
import pty
import re
import signal
import socket
import subprocess
import threading
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from prefix_service.settings import Settings
from tests.api.helpers import head
from tests.cli.conftest import on_terminal
from tests.commands import PREFIX_SERVICE, run_command
from tests.conftest import Server, free_port, running_server
from tests.forked import run_forked
from tests.processes import eventually, skip_under_nohup


def test_version_and_help() -> None:
    """The version is one line, and each of these commands has a help."""
    assert run_command("--version").stdout == "prefix-service 0.1.0\n"
    worker = ("publish", "fetch", "list", "inspect", "alias", "rm", "convert")
    operators = (
        "serve",
        "demo",
        "tenant",
        "key",
        "whoami",
        "audit",
        "residency",
        "backup",
        "openapi",
        "doctor",
        "bench",
    )
    for command in (*worker, *operators, "doctor", "bench"):
        shown = run_command(command, "--help")
        assert shown.returncode == 0
        assert f" {command} " in shown.stdout


def test_a_second_service_on_a_folder_is_refused(server: Server) -> None:
    """`serve` refuses a folder on which another service runs."""
    second = run_forked("serve", "--data-dir", server.data_dir, "--port", "0")
    assert second.returncode == 1
    assert "another prefix-service runs on the data folder" in second.stderr


def test_dev_mode_stays_on_loopback() -> None:
    """`serve --dev` refuses a host other than loopback, because there are no keys."""
    refused = run_forked("serve", "--dev", "--host", "0.0.0.0")  # noqa: S104 - it is refused
    assert refused.returncode == 1
    assert "loopback only" in refused.stderr


def test_dev_mode_needs_no_key_and_says_so(tmp_path: Path) -> None:
    """In dev mode requests need no key, the log says so, and no bootstrap key is made."""
    with running_server(tmp_path / "data", "--dev") as dev:
        assert httpx.get(f"{dev.url}/v1/tenants", timeout=60).status_code == 200
        assert "dev mode: no keys" in dev.log.read_text()
        assert dev.admin_key == ""


def test_several_workers_serve_one_folder(tmp_path: Path) -> None:
    """With `--workers 2` each process serves what another has published."""
    with running_server(tmp_path / "data", "--workers", "2") as server:
        config = {"peft_type": "PREFIX_TUNING", "num_layers": 2, "token_dim": 8, "num_attention_heads": 2}
        path = "/v1/tenants/acme/adapters/a"
        assert server.client().post(f"{path}/versions", json={"config": config}).status_code == 201
        answers = {server.client().get(f"{path}/prefix").status_code for _ in range(12)}  # 12 connections
        assert answers == {200}


@pytest.mark.parametrize("is_ready", [True, False])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_in_order(tmp_path: Path, number: signal.Signals, is_ready: bool) -> None:
    """SIGTERM, or the SIGHUP of a terminal that closes, ends the service with status 0 once it has answered the request
    under way. Until then it says that it is not ready, whether or not it was, and answers what comes over kept and new
    connections. It prints only lines of the log, and never the key."""
    skip_under_nohup(number)
    with running_server(tmp_path / "data") as server, httpx.Client(base_url=server.url, timeout=60) as kept:
        key, body = server.admin_key, b'{"max_adapters": 3}'
        if not is_ready:
            (server.data_dir / "blobs").rename(tmp_path / "away")
            eventually(lambda: httpx.get(f"{server.url}/readyz", timeout=60).status_code == 503)
        kept.get("/livez")
        fields = {"Authorization": f"Bearer {key}", "Content-Type": "application/json", "Connection": "close"}
        address = urlsplit(server.url)
        with socket.create_connection((address.hostname, address.port), timeout=60) as one:
            one.sendall(head("PUT", "/v1/tenants/late", **fields, Content_Length=str(len(body)), Expect="100-continue"))
            assert one.recv(100).startswith(b"HTTP/1.1 100")
            server.process.send_signal(number)
            eventually(lambda: "the service ends" in httpx.get(f"{server.url}/readyz", timeout=60).text)
            answer = kept.get("/v1/tenants/late")
            assert (answer.status_code, answer.headers["connection"]) == (401, "close")
            one.sendall(body)
            assert one.recv(100).startswith(b"HTTP/1.1 201")
        assert server.process.wait(timeout=90) == 0
        printed = server.log.read_text()
    lines = [json.loads(line) for line in printed.splitlines()]
    serving = next(line for line in lines if line["event"] == "serving")
    assert (serving["version"], serving["at"]) == ("0.1.0", server.url)
    assert "Traceback" not in printed
    assert key not in printed


def test_a_terminal_gets_lines_for_people(tmp_path: Path) -> None:
    """Once it listens, `serve` prints its address, documentation and how to take its key, then one line a request."""
    port, folder = free_port(), tmp_path / "data"
    command = [*PREFIX_SERVICE, "serve", "--port", str(port), "--data-dir", str(folder)]

    def ask() -> None:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
            eventually(lambda: (folder / "bootstrap.key").exists() and _answers(client))
            client.get("/v1/tenants/nobody", headers={"X-Request-ID": "the-last-one"})

    asking = threading.Thread(target=ask)
    asking.start()
    status, text = on_terminal(80, command, until="the-last-one")
    asking.join()
    assert status == 0, text
    lines = text.splitlines()
    begin = lines.index("prefix-service 0.1.0 is ready")
    assert lines[begin + 1 : begin + 6] == [
        f"  where   http://127.0.0.1:{port}",
        f"  docs    http://127.0.0.1:{port}/docs",
        f"  key     export PREFIX_API_KEY=$(cat {folder}/bootstrap.key)",
        f"  data    {folder}, prefixes on cpu",
        "  stop    Ctrl+C",
    ]
    line = next(line for line in lines if "the-last-one" in line)
    pattern = r"\d\d:\d\d:\d\d 401 GET none [\d.]+ ms \d+ B unauthenticated the-last-one"
    assert re.fullmatch(pattern, line)
    assert not any(line.startswith("{") for line in lines)


def test_a_terminal_that_is_not_read_stops_nobody(tmp_path: Path) -> None:
    """While a terminal is paused (Ctrl+S, tmux) requests are answered, and afterwards the log is whole. With `--json`
    the log has lines of JSON there too, and standard output says where the service listens.
    """
    controller, terminal = pty.openpty()
    command = [*PREFIX_SERVICE, "serve", "--json", "--port", "0", "--data-dir", str(tmp_path / "data")]
    serving = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=terminal, text=True)
    os.close(terminal)
    assert serving.stdout is not None
    document = ""
    while not document.endswith("}\n"):
        document += serving.stdout.readline()
    found = json.loads(document)
    assert found["key_file"] == str(tmp_path / "data" / "bootstrap.key")
    ids = [f"{number:0128}" for number in range(800)]  # with their lines far more than a terminal's 64 KiB
    try:
        with httpx.Client(base_url=found["at"], timeout=60) as client:
            for request_id in ids:
                assert client.get("/v1/tenants/nobody", headers={"X-Request-ID": request_id}).status_code == 401
        shown = ""
        while ids[-1] not in shown:
            shown += os.read(controller, 65536).decode()
        serving.send_signal(signal.SIGTERM)
        assert serving.wait(timeout=60) == 0
        assert serving.stdout.read() == ""
    finally:
        serving.kill()
        serving.stdout.close()
        os.close(controller)
    lines = [json.loads(line) for line in shown.splitlines() if line.endswith("}")]
    assert [line["request_id"] for line in lines if line["event"] == "request"] == ids


def _answers(client: httpx.Client) -> bool:
    try:
        return client.get("/readyz").status_code == 200
    except httpx.TransportError:
        return False


def test_help_shows_defaults_and_variables() -> None:
    """The help shows each option's default and variable, as the settings have them."""
    shown = " ".join(run_command("serve", "--help").stdout.split())
    for name in ("host", "port", "uds", "data_dir", "device", "workers", "dev", "read_only"):
        default = Settings.model_fields[name].default
        told = f"env var: PREFIX_{name.upper()}"
        assert f"[{told}]" in shown if default in (None, False) else f"[{told}; default: {default}]" in shown
    other = " ".join(run_command("list", "--help").stdout.split())
    assert "[env var: PREFIX_URL; default: http://127.0.0.1:8080]" in other
    assert "[env var: PREFIX_API_KEY]" in other


def test_openapi_names_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    """`openapi` refuses an output file that it cannot write, and names the missing folder."""
    refused = run_command("openapi", "-o", tmp_path / "none" / "openapi.json")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert f"there is no folder {tmp_path}/none" in refused.stderr


def test_a_device_that_is_not_there_is_told(tmp_path: Path) -> None:
    """`serve` refuses a GPU that this machine lacks, and a word that is no device."""
    for device, words in (("cuda:99", "is not there"), ("abacus", "must be auto, cpu, cuda")):
        refused = run_forked("serve", "--device", device, "--data-dir", tmp_path)
        assert refused.returncode == 1
        assert words in refused.stderr


def test_settings_from_the_environment_are_checked(tmp_path: Path) -> None:
    """The error names the variable whose value is out of bounds."""
    refused = run_forked("serve", "--data-dir", tmp_path, environment={"PREFIX_MAX_BATCH_SIZE": "0"})
    assert refused.returncode == 1
    assert "PREFIX_MAX_BATCH_SIZE" in refused.stderr
