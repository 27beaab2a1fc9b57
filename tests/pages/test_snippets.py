"""Runs every snippet of the pages unchanged, as one story of `acme/capitals`, in a checkout of its own."""

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from safetensors.torch import load_file

from tests.missing import not_tested
from tests.pages.markdown import PACKAGE, PAGES, README, ROOT, Snippet, snippets
from tests.pages.story import Story, network, pasted
from tests.vllm.driver import multi_config, transfer_config
from tests.vllm.smollm2 import smollm2

MODEL: Final = "HuggingFaceTB/SmolLM2-135M-Instruct"
VLLM: Final = PACKAGE / "client" / "vllm" / "README.md"
DEPLOY: Final = PACKAGE / "deploy" / "README.md"
LANGUAGES: Final = {"sh", "python", "json", "text"}
"""Languages of fences; `text` marks what nobody types here: pictures, and commands of engines and systemd."""
NEEDS: Final = {"node": "nodejs", "go": "golang-go", "java": "openjdk-17-jdk-headless", "curl": "curl"}

_INSTALL, _GATE, _FIRST, _WORKER, _VLLM, _WHEEL = (found for found in snippets(README) if found.language != "text")
_SERVE: Final = next(found for found in snippets(DEPLOY) if found.text.startswith("prefix-service serve"))
APART: Final = {_INSTALL, _GATE, _FIRST, _WHEEL, _SERVE}
"""Snippets with a test of their own below; those that need vLLM are read, not run."""
EVERY: Final = [found for page in PAGES for found in snippets(page)]
TOLD: Final = [
    found
    for found in EVERY
    if found.language in ("sh", "python") and found not in {*APART, _VLLM} and found.page != VLLM
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a Hugging Face cache that holds SmolLM2-135M-Instruct."""
    model = smollm2(tmp_path_factory)
    home = tmp_path_factory.mktemp("hugging-face")
    kept = home / "hub" / f"models--{MODEL.replace('/', '--')}"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "main").write_text("here")
    (kept / "snapshots").mkdir()
    (kept / "snapshots" / "here").symlink_to(model)
    return home


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Iterator[tuple[Story, str]]:
    """Yields the story, and what the terminal showed of the pasted first request, whose service runs on."""
    with network() as namespace:
        environment = {"HF_HOME": str(models), "HF_HUB_OFFLINE": "1"}
        told = Story(tmp_path_factory.mktemp("checkout"), namespace, environment)
        with pasted(told, _FIRST.text) as shown:
            told.sh("export PREFIX_API_KEY=$(cat data/bootstrap.key)")
            yield told, shown
            told.end()


@pytest.fixture(scope="module")
def story(first: tuple[Story, str]) -> Story:
    """Returns the shell of the first request."""
    return first[0]


def test_every_block_says_what_it_is() -> None:
    """Every fence has a known language, because one without would not be run."""
    assert {found.language for found in EVERY} <= LANGUAGES
    assert all(page.read_text().count("```") == 2 * len(snippets(page)) for page in PAGES)


def test_the_first_request_works_pasted_as_one_block(first: tuple[Story, str]) -> None:
    """The pasted request returns four rows, and no line of the block fails."""
    story, shown = first
    tensors = load_file(story.folder / "prefix.safetensors")
    assert tensors["attention_mask"].shape[0] == tensors["past_key_values.0.key"].shape[0] == 4
    assert "published acme/capitals@1" in shown
    assert "error" not in re.sub(r"^\{.*\}$", "", shown, flags=re.MULTILINE).lower()


def test_the_worker_says_what_peft_says(story: Story) -> None:
    """The worker's snippet has at most fifteen lines, is a whole program, and prints the capitals that PEFT prints."""
    lines = [line for line in _WORKER.text.splitlines() if line]
    assert len(lines) <= 15
    printed = story.python(_WORKER.text)
    assert '{"country": "Spain", "capital": "Madrid"}' in printed
    assert '{"country": "Hungary", "capital": "Budapest"}' in printed


@pytest.mark.parametrize("snippet", [found for found in TOLD if found.language == "sh"], ids=lambda found: found.name)
def test_a_snippet_of_shell(story: Story, snippet: Snippet) -> None:
    """Every line of the snippet succeeds."""
    program = snippet.text.split()[0]
    if program in NEEDS and shutil.which(program) is None:
        not_tested(f"{program} is missing: install {NEEDS[program]}")
    story.sh(snippet.text)


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page != README and any(s.page == page and s.language == "python" for s in TOLD)],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_the_python_of_a_page(story: Story, page: Path) -> None:
    """The Python blocks of a page run one after another as one program."""
    story.python("\n".join(found.text for found in TOLD if found.page == page and found.language == "python"))


def _config(text: str) -> dict[str, Any]:
    """Returns the JSON of `--kv-transfer-config`."""
    found = re.search(r"--kv-transfer-config '(.*?)'", text, re.DOTALL)
    assert found is not None
    parsed: dict[str, Any] = json.loads(found[1])
    return parsed


def _bodies(text: str) -> list[dict[str, Any]]:
    """Returns the JSON bodies of a snippet's requests."""
    return [json.loads(body) for body in re.findall(r"-d '(.*?)'$", text, re.DOTALL | re.MULTILINE)]


@pytest.mark.parametrize("page", [README, VLLM], ids=["front", "vllm"])
def test_the_commands_of_vllm(page: Path) -> None:
    """The page starts vLLM with the configuration of vLLM's own tests here, and every request names an adapter."""
    found = [snippet.text for snippet in snippets(page) if snippet.language == "sh" and "8000" in snippet.text]
    assert _config(found[0]) == transfer_config("http://127.0.0.1:8080")
    assert "--middleware prefix_service.client.vllm.PrefixMiddleware" in found[0]
    assert f"vllm serve {MODEL} " in found[0]
    bodies = [body for text in found for body in _bodies(text)]
    assert len(bodies) == len(found)
    for body in bodies:
        named = body.get("kv_transfer_params", {"prefix_adapter": body["model"]})
        assert named == {"prefix_adapter": "acme/capitals@prod"}
    for text in found:
        subprocess.run(["bash", "-n", "-c", text], check=True)


def test_the_python_of_vllm() -> None:
    """The Python snippet has the same configuration as the command, as a dictionary. It starts the engine behind the
    guard of a main module: on a CPU vLLM spawns processes, which import the script."""
    (snippet,) = (found for found in snippets(VLLM) if found.language == "python")
    assert '\nif __name__ == "__main__":' in snippet.text.partition("LLM(")[0]
    assigned = {
        node.targets[0].id: node.value
        for node in ast.parse(snippet.text).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    assert ast.literal_eval(assigned["transfer"]) == transfer_config("http://127.0.0.1:8080")
    assert ast.literal_eval(assigned["adapter"]) == {"kv_transfer_params": {"prefix_adapter": "acme/capitals@prod"}}


def test_the_connectors_of_vllm() -> None:
    """The page configures MultiConnector as its tests do, with our connector's own configuration as a part."""
    snippet = next(found for found in snippets(VLLM) if found.language == "json")
    config = json.loads(snippet.text)
    connectors = config["kv_connector_extra_config"]["connectors"]
    assert config == multi_config(*connectors)
    assert connectors[-1] == transfer_config("http://127.0.0.1:8080")


def test_the_second_command_is_the_gate() -> None:
    """The README's second command is the one with which .ci/run ends."""
    assert _GATE.text == "bash tests/run\n"
    assert f"exec {_GATE.text}" in (ROOT / ".ci" / "run").read_text()


def test_serve_in_the_foreground(tmp_path: Path) -> None:
    """The page's command becomes ready with both workers, and exits with 0 after SIGTERM."""
    with network() as namespace:
        story = Story(tmp_path, namespace, {})
        with (tmp_path / "log").open("wb") as log:
            command = [*namespace, "bash", "-c", f"exec {_SERVE.text}"]
            serving = subprocess.Popen(command, cwd=tmp_path, env=story.environment, stdout=log, stderr=log)
        try:
            story.sh("curl -sf --retry 60 --retry-connrefused --retry-delay 1 http://127.0.0.1:8080/readyz")
            serving.send_signal(signal.SIGTERM)
            assert serving.wait(timeout=90) == 0
        finally:
            serving.kill()
    assert (tmp_path / "data" / "bootstrap.key").exists()


@pytest.mark.skipif(os.environ.get("PREFIX_TEST_INSTALL") != "1", reason="PREFIX_TEST_INSTALL=1 installs for minutes")
def test_the_commands_in_a_fresh_clone(tmp_path: Path) -> None:
    """The first command, and those that install on a worker, succeed in a clone of the committed files."""
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(tmp_path / "clone")], check=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PREFIX_", "PYTHON"))}
    environment["PATH"] = os.pathsep.join(
        part for part in environment["PATH"].split(os.pathsep) if part != str(Path(sys.executable).parent)
    )

    def run(text: str) -> str:
        command = ["bash", "-euo", "pipefail", "-c", text]
        done = subprocess.run(command, cwd=tmp_path / "clone", env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert "answers equal PEFT's own" in run(_INSTALL.text)
    run(f"python3 -m venv worker && . worker/bin/activate && {_WHEEL.text}")
    assert "PrefixClient" in run(
        "cd / && $OLDPWD/worker/bin/python -c 'from prefix_service.client import *; print(PrefixClient)'"
    )
