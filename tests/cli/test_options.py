"""Every command that talks to a service takes --url, --uds, --ca-file and the key."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from prefix_service.cli.app import app
from tests.cli.test_completion import completed
from tests.client.transport.test_transport import tls_in_front_of
from tests.commands import run_command
from tests.conftest import CORPUS, Server, running_server

LLAMA = CORPUS / "cases" / "llama-n20-emb" / "adapter"
WAY = {"--url", "--api-key", "--uds", "--ca-file"}
OF_NO_SERVICE = {"serve", "demo", "convert", "backup", "migrate", "openapi", "deploy"}


def commands(group: Any, *names: str) -> Iterator[tuple[tuple[str, ...], set[str]]]:
    """Yields every command by its name, with its options."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, *names, name)
        else:
            yield (*names, name), {option for parameter in command.params for option in parameter.opts}


def test_every_command_that_leads_to_a_service_takes_the_same_options() -> None:
    """Commands that talk to a service take all four options, and others take none."""
    found = dict(commands(typer.main.get_command(app)))
    assert len(found) > 20
    for names, options in found.items():
        assert options & WAY == (set() if names[0] in OF_NO_SERVICE else WAY) | (
            {"--uds"} if names == ("serve",) else set()
        ), names


@pytest.fixture(scope="module")
def on_socket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Yields a service that listens on a Unix socket alone."""
    folder = tmp_path_factory.mktemp("socket")
    with running_server(folder / "data", "--uds", str(folder / "s"), uds=folder / "s") as running:
        yield running


def test_a_service_behind_a_unix_socket_is_managed(on_socket: Server) -> None:
    """Commands manage tenants, adapters and keys over a Unix socket."""
    way = ("--uds", str(on_socket.uds))
    admin = {"PREFIX_API_KEY": on_socket.admin_key, "PREFIX_URL": ""}

    def told(*arguments: str | Path) -> Any:
        done = run_command(*arguments, *way, "--json", environment=admin)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    assert told("publish", LLAMA, "acme/a")["version"] == 1
    assert [item["adapter"] for item in told("list", "acme")["items"]] == ["a"]
    assert told("fetch", "acme/a")["version"] == 1
    assert told("alias", "set", "acme/a", "prod", "1")["created_now"]
    made = told("key", "create", "--tenant", "acme", "--scope", "read")
    environment = {"PREFIX_API_KEY": made["key"]}
    assert json.loads(run_command("whoami", *way, "--json", environment=environment).stdout)["id"] == made["id"]
    words = f"prefix-service inspect --uds {on_socket.uds} "
    assert completed(words, **environment).stdout.split() == ["acme/a"]
    away = run_command("list", "acme", "--uds", f"{on_socket.uds}-none", environment=admin)
    assert away.returncode == 1
    assert f"unix:{on_socket.uds}-none" in away.stderr


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the proxy's half-closed sockets
def test_a_service_behind_tls_is_managed(server: Server, tmp_path: Path) -> None:
    """Commands trust the given authority, and refuse the certificate without it."""
    with tls_in_front_of(server.url, tmp_path) as (url, ca_file):
        admin = {"PREFIX_URL": url, "PREFIX_API_KEY": server.admin_key}
        trusting = run_command("whoami", "--ca-file", ca_file, environment=admin)
        assert trusting.returncode == 0, trusting.stderr
        refused = run_command("whoami", environment=admin)
        assert refused.returncode == 1
        assert "certificate" in refused.stderr
    missing = run_command("whoami", "--url", "https://localhost", "--ca-file", tmp_path / "none.pem")
    assert missing.returncode == 1
    assert f"ca_file {tmp_path / 'none.pem'} has no certificates that can be read" in missing.stderr
