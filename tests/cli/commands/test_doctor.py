"""`doctor` reports what is wrong and what to do, whether or not the service can be reached."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Run
from tests.commands import Finished, run_command
from tests.conftest import Server, running_server


@pytest.fixture(autouse=True)
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in a folder without `data`, which `doctor` looks at: a checkout has one after the first request."""
    monkeypatch.chdir(tmp_path)


AWAY = {"PREFIX_URL": "http://127.0.0.1:9", "PREFIX_API_KEY": ""}


def checks(finished: Finished) -> dict[str, dict[str, str]]:
    """Returns the checks that a run printed as JSON, by their names."""
    return {check["name"]: check for check in json.loads(finished.stdout)["checks"]}


@contextmanager
def answering(version: str, date: str) -> Iterator[str]:
    """Runs a service of another version, on a machine with another clock; yields its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            documents: dict[str, Any] = {"/readyz": {"status": "ok"}, "/openapi.json": {"info": {"version": version}}}
            found = documents.get(self.path)
            body = json.dumps(found or {"code": "not-found", "detail": "no"}).encode()
            self.send_response(200 if found else 404)
            self.send_header("Content-Type", "application/json" if found else "application/problem+json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def date_time_string(self, _timestamp: float | None = None) -> str:
            return date

        def log_message(self, *_arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_address[1]}"
        listening.shutdown()


def test_all_is_well(run: Run, server: Server) -> None:
    """The table and the JSON have every check, with the versions, the address and the device."""
    done = run("doctor")
    assert done.returncode == 0, done.stdout
    for words in ("versions", "prefix-service 0.1.0, the service 0.1.0", f"{server.url} is ready", "within ", "GiB"):
        assert words in done.stdout
    found = checks(run("doctor", "--json"))
    assert list(found) == ["versions", "service", "key", "clock", "settings", "disk", "permissions", "device"]
    assert {found[name]["state"] for name in ("versions", "service", "clock", "settings", "device")} == {"ok"}
    assert found["settings"]["found"] == "PREFIX_API_KEY, PREFIX_URL"


def test_a_service_that_is_away() -> None:
    """Without a service `doctor` runs the checks that need none, and advises how to start one."""
    done = run_command("doctor", environment=AWAY)
    assert done.returncode == 1
    assert "http://127.0.0.1:9 cannot be reached" in done.stdout
    assert "service: start the service with `prefix-service serve`, or name another" in done.stdout
    found = checks(run_command("doctor", "--json", environment=AWAY))
    assert list(found) == ["versions", "service", "settings", "disk", "permissions", "device"]
    assert found["service"]["state"] == "failed"


def test_what_is_wrong_here_is_said_with_what_to_do(tmp_path: Path) -> None:
    """Each wrong setting, folder and device, and a URL that is none, is reported with advice."""
    (tmp_path / "data").mkdir(mode=0o755)
    wrong = {"PREFIX_URL": "ftp://x", "PREFIX_MAX_BATCH_SIZE": "0", "PREFIX_DEVICE": "cuda:99"}
    done = run_command("doctor", "--json", environment={**wrong, "PREFIX_DATA_DIR": str(tmp_path / "data")})
    found = checks(done)
    assert done.returncode == 1
    assert {name for name, check in found.items() if check["state"] == "failed"} == {"service", "settings", "device"}
    assert "PREFIX_MAX_BATCH_SIZE" in found["settings"]["found"]
    assert found["permissions"]["advice"] == f"chmod go= {tmp_path / 'data'}"
    assert all(check["advice"] for check in found.values() if check["state"] != "ok")


def test_over_a_unix_socket_on_the_services_own_folder(tmp_path: Path) -> None:
    """Over a Unix socket all checks run, those of the folder's permissions, disk and catalog too."""
    socket = tmp_path / "s"
    with running_server(tmp_path / "data", "--uds", str(socket), uds=socket) as running:
        environment = {"PREFIX_API_KEY": running.admin_key, "PREFIX_DATA_DIR": str(tmp_path / "data")}
        done = run_command("doctor", "--uds", socket, "--json", environment=environment)
    found = checks(done)
    assert done.returncode == 0, done.stdout
    expected = ["versions", "service", "key", "clock", "settings", "disk", "permissions", "catalog", "device"]
    assert [(name, found[name]["state"]) for name in found] == [(name, "ok") for name in expected]
    assert found["service"]["found"].startswith(f"unix:{socket} is ready")
    assert found["catalog"]["found"].startswith("schema 00")


def test_another_release_and_another_clock() -> None:
    """Another release, another clock and a missing whoami are warnings, which leave the status 0."""
    with answering("9.9.9", "Thu, 01 Jan 2026 00:00:00 GMT") as url:
        done = run_command("doctor", "--json", environment={"PREFIX_URL": url})
    found = checks(done)
    assert done.returncode == 0, done.stdout
    assert "the service 9.9.9" in found["versions"]["found"]
    assert found["versions"]["advice"].startswith("update the older one")
    assert "ahead of the service's" in found["clock"]["found"] or "behind" in found["clock"]["found"]
    assert "NTP" in found["clock"]["advice"]
    assert found["key"]["state"] == "warning"
