"""Which commands do without torch, which takes seconds to import, and what one says that lacks the extra `server`."""

import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from prefix_service.cli.app import OF_SERVER
from prefix_service.client import PrefixClient
from prefix_service.data_folder.opening import opened
from prefix_service.settings import Settings
from tests.client.test_client import published
from tests.conftest import CORPUS, Server

_WITHOUT_TORCH = """
import sys
from prefix_service.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
assert not {"torch", "numpy"} & sys.modules.keys()
"""
# As if nothing of the extra `server` was installed.
_WITHOUT_SERVER = """
import sys
from importlib.abc import MetaPathFinder

class Missing(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name in SERVER:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
from prefix_service.cli import main
main()
"""


def run(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `prefix-service …` by a program."""
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, env={**os.environ, **environment})


@pytest.fixture(scope="module")
def service(server: Server) -> dict[str, str]:
    """An environment that leads to a service with adapters."""
    with PrefixClient(server.url, server.admin_key) as client:
        for name in ("a", "leaving"):
            published(client, f"imports/{name}")
    return {"PREFIX_URL": server.url, "PREFIX_API_KEY": server.admin_key}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data folder of a stopped service."""
    data_dir = tmp_path_factory.mktemp("imports") / "data"
    with opened(Settings(data_dir=data_dir)):
        return data_dir


ON_A_SERVICE = (
    f"publish {CORPUS / 'cases' / 'llama-n20-emb' / 'adapter'} imports/published",
    "compose imports/composed imports/a imports/a",
    *("list imports", "versions imports/a", "inspect imports/a", "rm imports/leaving --yes"),
    *("alias set imports/a prod 1", "alias list imports/a", "alias rm imports/a prod"),
    *("residency load imports/a", "residency", "residency unload imports/a"),
    *("tenant set imports", "tenant show imports", "tenant list", "tenant rm imports-none --yes"),
    *("key create --tenant imports --scope read", "key list", "whoami", "audit"),
)


@pytest.mark.parametrize("command", ON_A_SERVICE)
def test_commands_on_a_service_do_without_torch(service: dict[str, str], command: str) -> None:
    """Only who fetches tensors waits for it."""
    if "imports-none" in command:
        run(_WITHOUT_TORCH, "tenant", "set", "imports-none", **service)
    done = run(_WITHOUT_TORCH, *command.split(), **service)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", ["key create --platform --scope read", "key list", "backup {copy}"])
def test_commands_on_a_folder_do_without_torch(folder: Path, tmp_path: Path, command: str) -> None:
    """Keys and bytes are no tensors."""
    done = run(_WITHOUT_TORCH, *command.format(copy=tmp_path / "copy").split(), "--data-dir", str(folder))
    assert done.returncode == 0, done.stderr


def without_server() -> str:
    return _WITHOUT_SERVER.replace("SERVER", repr(set(OF_SERVER - {"anyio"})))  # anyio comes with httpx too


# What the others remove is gone.
@pytest.mark.parametrize("command", [command for command in ON_A_SERVICE if " --yes" not in command])
def test_commands_on_a_service_need_no_extra(service: dict[str, str], command: str) -> None:
    """What `pip install prefix-service` brings is enough to publish and to manage."""
    done = run(without_server(), *command.split(), **service)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", ["serve", "openapi", "backup copy", "key list"])
def test_a_command_that_lacks_the_extra_says_so(folder: Path, command: str) -> None:
    """In one line that can be pasted."""
    of_folder = () if command == "openapi" else ("--data-dir", str(folder))
    done = run(without_server(), *command.split(), *of_folder)
    assert done.returncode == 1
    assert done.stderr.endswith("pip install 'prefix-service[server]'\n"), done.stderr
    assert done.stderr.count("\n") == 1


def _required(extra: str | None) -> Iterator[str]:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    for requirement in project["dependencies"] if extra is None else project["optional-dependencies"][extra]:
        yield requirement.partition(">=")[0].partition("[")[0].replace("-", "_")


def test_the_extra_is_what_pyproject_says() -> None:
    """And the command line itself needs none of it."""
    assert set(_required("server")) == OF_SERVER
    assert {"typer", "rich"} <= set(_required(None))
