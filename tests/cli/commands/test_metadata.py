"""Model card and annotations: published with a folder, and seen in `versions`, `diff`, `inspect` and `pull`."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Run
from tests.conftest import CORPUS

LLAMA, OTHER = (CORPUS / "cases" / name / "adapter" for name in ("llama-n20-emb", "llama-n20-proj"))
CARD = "# Capitals\n\nTrained on 200 questions.\n"
NOTE = "less data, and what is longer than a table has room for"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two adapters, each with its card."""
    made = tmp_path_factory.mktemp("first") / "a", tmp_path_factory.mktemp("second") / "a"
    for source, folder, card in zip((LLAMA, OTHER), made, (CARD, CARD.replace("200", "300")), strict=True):
        shutil.copytree(source, folder)
        (folder / "README.md").write_text(card)
    return made


@pytest.fixture
def adapter(run: Run, folders: tuple[Path, Path]) -> str:
    """Both as versions of one adapter."""
    name = "climeta/capitals"
    for folder, run_name in zip(folders, ("17", "18"), strict=True):
        done = run("publish", folder, name, "--annotate", f"run={run_name}", "--note", NOTE)
        assert done.returncode == 0, done.stderr
    return name


def told(run: Run, *arguments: str | Path) -> Any:
    """What a command tells a script."""
    done = run(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_versions_show_annotations(run: Run, adapter: str) -> None:
    """Whole for a script; a long one is cut in the table, which has no such column where there are none."""
    items = told(run, "versions", adapter)["items"]
    assert [item["annotations"] for item in items] == [{"note": NOTE, "run": number} for number in ("18", "17")]
    shown = run("versions", adapter).stdout
    assert "run=17" in shown
    assert f"note={NOTE[:39]}…" in shown
    run("publish", LLAMA, "climeta/bare")
    assert "annotations" not in run("versions", "climeta/bare").stdout


def test_diff_shows_which_differ(run: Run, adapter: str) -> None:
    """The annotations that are not the same, and the lines of the cards."""
    changed = told(run, "diff", f"{adapter}@1", f"{adapter}@2")["changed"]
    assert changed["annotation: run"] == ["17", "18"]
    assert "annotation: note" not in changed
    assert changed["card"] == [CARD, CARD.replace("200", "300")]
    shown = run("diff", f"{adapter}@1", f"{adapter}@2").stdout.splitlines()
    assert ["annotation:", "run", "17", "18"] in [line.split() for line in shown]
    assert shown[-2:] == ["-Trained on 200 questions.", "+Trained on 300 questions."]
    assert "card" not in run("diff", f"{adapter}@1", f"{adapter}@1").stdout


def test_diff_of_the_same_content_in_two_adapters(run: Run, adapter: str) -> None:
    """The content is the same; what was said of it is not."""
    run("publish", LLAMA, "climeta/bare")
    shown = run("diff", f"{adapter}@1", "climeta/bare").stdout
    assert "have the same content" in shown
    assert "annotation: run" in shown
    assert "-Trained on 200 questions." in shown.splitlines()


def test_pull_writes_the_card(run: Run, adapter: str, folders: tuple[Path, Path], tmp_path: Path) -> None:
    """The folder is what was published, file for file; annotations are printed."""
    shown = run("pull", f"{adapter}@1", tmp_path / "again").stdout.splitlines()
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()} == {
        path.name: path.read_bytes() for path in folders[0].iterdir()
    }
    assert shown[-2:] == [f"annotation note={NOTE}", "annotation run=17"]
    assert told(run, "pull", f"{adapter}@2", tmp_path / "second")["annotations"] == {"note": NOTE, "run": "18"}
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "README.md").write_text("mine")
    refused = run("pull", f"{adapter}@1", kept)
    assert refused.returncode == 1
    assert f"{kept}/README.md exists" in refused.stderr
