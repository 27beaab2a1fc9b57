"""With `--json` every command prints one JSON document on standard output, whether it succeeds or fails.

Commands run in this process, which saves the start of ninety others. `serve` and `demo`, which end late, succeed in
`commands/test_serve.py` and `demo/test_demo.py`.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer.main

from prefix_service.cli.app import app, run
from prefix_service.client import PrefixClient
from prefix_service.data_folder.opening import opened
from prefix_service.settings import Settings
from tests.architectures import base
from tests.cli.test_options import OF_NO_SERVICE, commands
from tests.client.test_client import published
from tests.conftest import CORPUS, Server

LLAMA, OTHER = (CORPUS / "cases" / name / "adapter" for name in ("llama-n20-emb", "llama-n20-proj"))
TENANT = "clieveryjson"
NAME = f"{TENANT}/a"
EVERY = {" ".join(names) for names, _ in commands(typer.main.get_command(app))}
SUCCEED = {
    "publish": f"publish {LLAMA} {TENANT}/published",
    "compose": f"compose {TENANT}/composed {NAME} {NAME}",
    "convert": f"convert {LLAMA} {{folder}}/converted",
    "compile": "compile {folder}/compiled --model {folder}/model --tokens {folder}/ids",
    "fetch": f"fetch {NAME}",
    "pull": f"pull {NAME} {{folder}}/pulled",
    "list": f"list {TENANT}",
    "versions": f"versions {NAME}",
    "inspect": f"inspect {NAME}",
    "diff": f"diff {NAME}@1 {NAME}@2",
    "alias list": f"alias list {NAME}",
    "alias set": f"alias set {NAME} prod 2",
    "alias rollback": f"alias rollback {NAME}@prod",
    "alias rm": f"alias rm {NAME} gone",
    "rm": f"rm {TENANT}/leaving --yes",
    "tenant list": "tenant list",
    "tenant show": f"tenant show {TENANT}",
    "tenant set": f"tenant set {TENANT} --max-adapters 100",
    "tenant rm": f"tenant rm {TENANT}-leaving --yes",
    "key create": f"key create --tenant {TENANT} --scope read --name made",
    "key list": f"key list --tenant {TENANT}",
    "key rotate": f"key rotate {{rotated}} --tenant {TENANT}",
    "key revoke": f"key revoke {{key}} --tenant {TENANT}",
    "whoami": "whoami",
    "audit": f"audit {TENANT}",
    "usage": f"usage {TENANT}",
    "residency show": "residency show",
    "residency load": f"residency load {NAME}",
    "residency unload": f"residency unload {NAME}",
    "doctor": "doctor",
    "bench": f"bench {NAME} --seconds 0.1",
    "backup": "backup {folder}/copy --data-dir {data}",
    "migrate": "migrate --data-dir {data} --to-data-dir {folder}/moved",
    "openapi": "openapi",
    "deploy": "deploy nginx",
}
"""A use of each command that succeeds, in any order."""
FAIL = {
    "serve": ("serve --dev --host 0.0.0.0", "invalid-input"),
    "backup": ("backup {folder} --data-dir {data}", "conflict"),
    "migrate": ("migrate --data-dir {data}", "invalid-input"),
    "openapi": ("openapi -o {folder}", "invalid-request"),
    "deploy": ("deploy grafana -o {folder}", "invalid-request"),
    "convert": (f"convert {LLAMA} {LLAMA}", "conflict"),
    "compile": (f"compile {LLAMA} {{folder}}/none --model {{folder}}/model", "invalid-config"),
    "pull": (f"pull {NAME} {LLAMA}", "conflict"),
}
"""Uses that fail; the other commands fail where the service's address is none."""

Told = Callable[[str], tuple[int | str | None, Any]]


@pytest.fixture(scope="module")
def names(server: Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Returns what the commands name: adapters, a key, a folder to write into, and a stopped service's."""
    with PrefixClient(server.url, server.admin_key) as client:
        for folder in (LLAMA, OTHER):
            published(client, NAME, folder)
        published(client, f"{TENANT}/leaving")
        client.put_tenant(f"{TENANT}-leaving")
        for number in (1, 2, 1):
            client.put_alias(NAME, "prod", number)
        client.put_alias(NAME, "gone", 1)
        key, rotated = (client.create_key("read", TENANT)["id"] for _ in range(2))
    folder = tmp_path_factory.mktemp("json")
    with opened(Settings(data_dir=folder / "data")):
        pass
    base("llama").save_pretrained(folder / "model")
    (folder / "ids").write_text("1 5 6")
    return {"key": key, "rotated": rotated, "folder": str(folder), "data": str(folder / "data")}


@pytest.fixture
def told(
    server: Server, names: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Told:
    """Runs a command with `--json`; returns its exit status, and the one document that it printed."""
    for name, value in (("URL", server.url), ("API_KEY", server.admin_key), ("DATA_DIR", names["data"])):
        monkeypatch.setenv(f"PREFIX_{name}", value)
    for name in ("DEV", "HOST"):  # which `serve` sets for its workers
        monkeypatch.setenv(f"PREFIX_{name}", "")
        monkeypatch.delenv(f"PREFIX_{name}")

    def tell(words: str) -> tuple[int | str | None, Any]:
        monkeypatch.setattr(sys, "argv", ["prefix-service", *words.format(**names).split(), "--json"])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            run()
        printed = capsys.readouterr()
        assert printed.out, printed.err
        return end.value.code, json.loads(printed.out)

    return tell


def test_every_command_is_here() -> None:
    """The tables of this module have every command."""
    assert set(SUCCEED) == EVERY - {"serve", "demo"}
    assert set(FAIL) >= OF_NO_SERVICE - {"demo"}


@pytest.mark.parametrize("command", sorted(SUCCEED))
def test_what_succeeds_is_a_document(told: Told, command: str) -> None:
    """A command that succeeds prints a document without an error."""
    status, document = told(SUCCEED[command])
    assert not status, document
    assert "error" not in document


@pytest.mark.parametrize("command", sorted(EVERY))
def test_wrong_usage_is_a_document(told: Told, command: str) -> None:
    """The document of wrong usage names the unknown option."""
    status, document = told(f"{command} --nonsense")
    assert (status, document["error"]["code"]) == (2, "wrong-usage")
    assert "--nonsense" in document["error"]["detail"]


@pytest.mark.parametrize("command", sorted(EVERY - {"demo", "doctor"}))
def test_what_fails_is_a_document(told: Told, command: str) -> None:
    """The document has the error's code; `doctor` never fails so, and `demo` brings its own service."""
    words, code = FAIL.get(command) or (f"{SUCCEED[command]} --url nonsense", "invalid-request")
    status, document = told(words)
    assert (status, document["error"]["code"]) == (1, code)


def test_no_is_a_document(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answering a question with no prints a document with the code `aborted`."""
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("rich.prompt.Confirm.ask", lambda *_, **__: False)
    status, document = told(f"rm {NAME}")
    assert (status, document["error"]["code"]) == (1, "aborted")


def test_a_folder_of_documents(tmp_path: Path, told: Told) -> None:
    """`openapi -o` prints the path of the file that it wrote."""
    assert told(f"openapi -o {tmp_path}/openapi.json") == (0, {"path": f"{tmp_path}/openapi.json"})
    assert json.loads((tmp_path / "openapi.json").read_text())["openapi"]
