"""`serve` and `openapi`: what who runs the service types."""

import json
import signal
from pathlib import Path

import httpx

from tests.cli.conftest import run_command
from tests.conftest import Server, running_server


def test_version_and_help() -> None:
    """The version is one line; every command has a help."""
    assert run_command("--version").stdout == "prefix-service 0.1.0\n"
    worker = ("publish", "fetch", "list", "inspect", "alias", "rm", "convert")
    for command in (*worker, "serve", "demo", "tenant", "key", "whoami", "audit", "residency", "backup", "openapi"):
        shown = run_command(command, "--help")
        assert shown.returncode == 0
        assert f" {command} " in shown.stdout


def test_a_second_service_on_a_folder_is_refused(server: Server) -> None:
    """Two services never write to one folder."""
    second = run_command("serve", "--data-dir", server.data_dir, "--port", "0")
    assert second.returncode == 1
    assert "another prefix-service runs on the data folder" in second.stderr


def test_dev_mode_stays_on_loopback() -> None:
    """Without keys nobody from outside may come in."""
    refused = run_command("serve", "--dev", "--host", "0.0.0.0")  # noqa: S104 - it is refused
    assert refused.returncode == 1
    assert "loopback only" in refused.stderr


def test_dev_mode_needs_no_key_and_says_so(tmp_path: Path) -> None:
    """Everybody on this machine may do everything, and no bootstrap key is made."""
    with running_server(tmp_path / "data", "--dev") as dev:
        assert httpx.get(f"{dev.url}/v1/tenants").status_code == 200
        assert "dev mode: no keys" in dev.log.read_text()
        assert dev.admin_key == ""


def test_several_workers_serve_one_folder(tmp_path: Path) -> None:
    """`--workers 2`: what one process published the other serves."""
    with running_server(tmp_path / "data", "--workers", "2") as server:
        config = {"peft_type": "PREFIX_TUNING", "num_layers": 2, "token_dim": 8, "num_attention_heads": 2}
        path = "/v1/tenants/acme/adapters/a"
        assert server.client().post(f"{path}/versions", json={"config": config}).status_code == 201
        answers = {server.client().get(f"{path}/prefix").status_code for _ in range(12)}  # 12 connections
        assert answers == {200}


def test_a_signal_ends_it_in_order(tmp_path: Path) -> None:
    """SIGTERM: exit status 0, nothing printed but lines of the log, and the key never."""
    with running_server(tmp_path / "data") as server:
        key = server.admin_key
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=30) == 0
        printed = server.log.read_text()
    lines = [json.loads(line) for line in printed.splitlines()]
    serving = next(line for line in lines if line["event"] == "serving")
    assert (serving["version"], serving["at"]) == ("0.1.0", server.url)
    assert "Traceback" not in printed
    assert key not in printed


def test_a_device_that_is_not_there_is_told(tmp_path: Path) -> None:
    """A GPU that this machine lacks, and a word that is no device."""
    for device, words in (("cuda:99", "is not there"), ("abacus", "must be auto, cpu, cuda")):
        refused = run_command("serve", "--device", device, "--data-dir", tmp_path)
        assert refused.returncode == 1
        assert words in refused.stderr


def test_settings_from_the_environment_are_checked(tmp_path: Path) -> None:
    """A value out of bounds is named with its variable."""
    refused = run_command("serve", "--data-dir", tmp_path, environment={"PREFIX_MAX_BATCH_SIZE": "0"})
    assert refused.returncode == 1
    assert "PREFIX_MAX_BATCH_SIZE" in refused.stderr
