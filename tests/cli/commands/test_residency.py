"""`residency` shows which versions are in memory, and loads, pins and unloads them."""

import json
from typing import Any

import pytest

from prefix_service.cli.commands.residency import where
from tests.cli.conftest import Run
from tests.conftest import CORPUS


def test_a_version_is_loaded_shown_and_unloaded(run: Run) -> None:
    """The overview names a version, and why it stays, while it is in memory; `--json` is the service's answer."""
    run("publish", CORPUS / "cases" / "llama-n20-emb" / "adapter", "climemory/a")
    done = run("residency", "load", "climemory/a@1", "--pin")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "climemory/a@1 is in memory on cpu, pinned\n"
    shown = run("residency", "--limit", "1000").stdout
    row = next(line.split() for line in shown.splitlines() if line.split()[:1] == ["climemory/a@1"])
    assert row[1:3] == ["16.0", "KiB"]  # the least that a version counts for: it has 7.5 KiB
    assert row[-1] == "pinned"
    assert any(line.split()[:2] == ["climemory", "device"] for line in shown.splitlines())
    told = json.loads(run("residency", "--json").stdout)
    assert [tier["name"] for tier in told["tiers"]] == ["device", "host"]
    let_go = json.loads(run("residency", "load", "climemory/a", "--json").stdout)
    assert (let_go["resident"], let_go["pinned"]) == (True, False)
    assert run("residency", "unload", "climemory/a").stdout == "unloaded climemory/a\n"
    assert "climemory/a@1" not in run("residency", "show", "--limit", "1000").stdout


def test_alone_it_is_the_overview_and_its_help_names_the_rest(run: Run) -> None:
    """Without a command `residency` is `show`; an unknown command is wrong usage."""
    assert "Memory" in run("residency").stdout
    assert "unload" in run("residency", "--help").stdout
    assert run("residency", "frobnicate").returncode == 2
    assert "error (not-found)" in run("residency", "load", "climemory/none").stderr


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"pinned": True, "process": 7, "processes": 2}, "on cpu in worker process 7, one of 2, pinned"),
        ({"pinned": False, "process": 7, "processes": 1}, "on cpu"),
        ({"pinned": False}, "on cpu"),
    ],
)
def test_one_of_several_processes_is_named(state: dict[str, Any], words: str) -> None:
    """A pin is one process's, so its number is there if the service has several; earlier releases do not say."""
    assert where({"device": "cpu", **state}) == words
