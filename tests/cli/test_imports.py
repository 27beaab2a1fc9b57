"""Commands without tensors do not import torch, which takes seconds, nor the libraries of addresses that they were not
given; others say if the extra `server` is missing."""

import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main

from prefix_service.cli.app import OF_SERVER, app
from prefix_service.client import PrefixClient
from prefix_service.data_folder.opening import opened
from prefix_service.settings import Settings
from tests.cli.test_options import commands
from tests.client.test_client import published
from tests.conftest import CORPUS, Server

# One process runs many commands, which saves their starts. The first that fails or imports too much ends it.
_EACH = """
import sys
from prefix_service.cli import main
for words in sys.argv[1:]:
    sys.argv = ["prefix-service", *words.split()]
    try:
        main()
    except SystemExit as end:
        assert not end.code, (words, end.code)
    assert not {"torch", "numpy", "huggingface_hub", "obstore", "oras", "requests"} & sys.modules.keys(), words
"""
# The process behaves as if nothing of the extra `server` was installed.
_WITHOUT_SERVER = """
import sys
from importlib.abc import MetaPathFinder

class Missing(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name in SERVER:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
"""
_MAIN = """
from prefix_service.cli import main
main()
"""


def run(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs `prefix-service …` by a program."""
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, env={**os.environ, **environment})


@pytest.fixture(scope="module")
def service(server: Server) -> dict[str, str]:
    """Returns an environment that leads to a service with adapters."""
    with PrefixClient(server.url, server.admin_key) as client:
        for name in ("a", "leaving"):
            published(client, f"imports/{name}")
    return {"PREFIX_URL": server.url, "PREFIX_API_KEY": server.admin_key}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the data folder of a stopped service."""
    data_dir = tmp_path_factory.mktemp("imports") / "data"
    with opened(Settings(data_dir=data_dir)):
        return data_dir


COMPUTE = {"serve", "demo", "openapi", "fetch", "diff", "bench", "doctor", "convert", "compile"}
"""These need torch: for tensors, for the base model (`compile`), for the device (`doctor`), or for the service, which
computes (`serve`, `openapi`)."""


@pytest.fixture(scope="module")
def commands_on_a_service(server: Server, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Returns the other commands that talk to a service, to be run one after another."""
    scratch = tmp_path_factory.mktemp("commands")
    with PrefixClient(server.url, server.admin_key) as client:
        rotated, revoked = (client.create_key("read")["id"] for _ in range(2))
        client.put_tenant("imports-none")
    return [
        f"publish {CORPUS / 'cases' / 'llama-n20-emb' / 'adapter'} imports/published --note why",
        f"publish {CORPUS / 'variants' / 'peft_full-accelerate-gpt2-proj'} imports/cut",
        *("compose imports/composed imports/a imports/a", f"pull imports/a {scratch / 'pulled'}"),
        *("list imports", "versions imports/a", "inspect imports/a"),
        *("alias set imports/a prod 1", "alias list imports/a", "alias rm imports/a prod"),
        *("compose imports/a imports/a imports/a", "alias set imports/a prod 1", "alias set imports/a prod 2"),
        *("alias rollback imports/a@prod", "rm imports/leaving --yes"),
        *("residency load imports/a", "residency", "residency show", "residency unload imports/a"),
        *("tenant set imports", "tenant show imports", "tenant list", "tenant rm imports-none --yes"),
        *("key create --tenant imports --scope read", "key list", f"key rotate {rotated} --platform"),
        *(f"key revoke {revoked} --platform", "whoami", "audit", "usage imports"),
        "deploy grafana",
    ]


def test_every_command_is_here(commands_on_a_service: list[str]) -> None:
    """The lists of this module have every command."""
    every = {names[0] for names, _ in commands(typer.main.get_command(app))}
    assert {words.split()[0] for words in [*commands_on_a_service, *ON_A_FOLDER]} | COMPUTE == every


def test_commands_on_a_service_do_without_torch(service: dict[str, str], commands_on_a_service: list[str]) -> None:
    """Only commands that fetch tensors import torch; `publish` cuts a prefix out without it."""
    done = run(_EACH, *commands_on_a_service, **service)
    assert done.returncode == 0, done.stderr
    assert "cut out the prefix: " in done.stderr


ON_A_FOLDER = ("key create --platform --scope read", "key list", "backup {copy}", "migrate --to-data-dir {copy}-moved")


def test_commands_on_a_folder_do_without_torch(folder: Path, tmp_path: Path) -> None:
    """Commands on a data folder do not import torch."""
    asked = [f"{words.format(copy=tmp_path / 'copy')} --data-dir {folder}" for words in ON_A_FOLDER]
    done = run(_EACH, *asked)
    assert done.returncode == 0, done.stderr


def without_server() -> str:
    return _WITHOUT_SERVER.replace("SERVER", repr(set(OF_SERVER - {"anyio"})))  # anyio comes with httpx too


def test_commands_on_a_service_need_no_extra(service: dict[str, str], commands_on_a_service: list[str]) -> None:
    """`pip install prefix-service` is enough to publish and to manage."""
    once = (" --yes", "key rotate", "key revoke", "pull", "rollback", "alias rm")  # done already
    again = [words for words in commands_on_a_service if not any(one in words for one in once)]
    done = run(without_server() + _EACH, *again, **service)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", ["serve", "openapi", "backup copy", "migrate --to-data-dir copy", "key list"])
def test_a_command_that_lacks_the_extra_says_so(folder: Path, command: str) -> None:
    """The error is one line with the `pip install` to paste."""
    of_folder = () if command == "openapi" else ("--data-dir", str(folder))
    done = run(without_server() + _MAIN, *command.split(), *of_folder)
    assert done.returncode == 1
    assert done.stderr.endswith("pip install 'prefix-service[server]'\n"), done.stderr
    assert done.stderr.count("\n") == 1


def test_compile_says_which_extra_it_lacks() -> None:
    """`compile` needs transformers, of an extra of its own."""
    missing = _WITHOUT_SERVER.replace("SERVER", "{'transformers'}")
    done = run(missing + _MAIN, "compile", "--model", "x", "adapter", "out")
    assert done.returncode == 1
    assert done.stderr.endswith("pip install 'prefix-service[compile]'\n"), done.stderr
    assert done.stderr.count("\n") == 1


def _required(extra: str | None) -> Iterator[str]:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    for requirement in project["dependencies"] if extra is None else project["optional-dependencies"][extra]:
        yield requirement.partition(">=")[0].partition("[")[0].replace("-", "_")


def test_the_extra_is_what_pyproject_says() -> None:
    """The extra has the packages that these tests hide, and the command line needs none of them but h11."""
    both = {"h11"}  # has a narrower bound in the extra
    assert set(_required("server")) - both == OF_SERVER
    assert {"typer", "rich"} <= set(_required(None))
