"""`alias`: rolled out, listed, rolled back."""

import json

import pytest

from prefix_service.client import PrefixClient
from tests.cli.conftest import Run
from tests.client.conftest import GPT2, LLAMA
from tests.client.test_client import published
from tests.commands import run_command
from tests.conftest import Server


@pytest.fixture(scope="module", autouse=True)
def adapter(server: Server) -> None:
    """An adapter with two versions."""
    with PrefixClient(server.url, server.admin_key) as client:
        for folder in (LLAMA, GPT2):
            published(client, "clialias/a", folder)


def listed(run: Run) -> dict[str, int]:
    """What `alias list` tells a script."""
    told = run("alias", "list", "clialias/a", "--json")
    return {item["alias"]: item["version"] for item in json.loads(told.stdout)["items"]}


def test_an_alias_is_set_listed_and_removed(run: Run) -> None:
    """A line for each step; the table and the JSON show where every alias points."""
    made = run("alias", "set", "clialias/a", "prod", "1")
    assert (made.returncode, made.stdout) == (0, "made clialias/a@prod: version 1\n")
    moved = run("alias", "set", "clialias/a", "prod", "2", "--preload")
    assert (moved.stdout, moved.stderr) == ("clialias/a@prod: version 2\n", "")
    told = json.loads(run("alias", "set", "clialias/a", "old", "1", "--json").stdout)
    assert told == {"alias": "old", "version": 1, "created_now": True}
    assert listed(run) == {"old": 1, "prod": 2}
    shown = run("alias", "list", "clialias/a").stdout
    assert [line.split() for line in shown.splitlines() if line.split()[:1] in (["old"], ["prod"])] == [
        ["old", "1"],
        ["prod", "2"],
    ]
    assert run("alias", "rm", "clialias/a", "old").stdout == "deleted clialias/a@old\n"
    assert listed(run) == {"prod": 2}


def test_conditions_keep_what_somebody_else_changed(run: Run) -> None:
    """--if-match and --create-only refuse with the version that the alias points at."""
    assert run("alias", "set", "clialias/a", "cas", "1", "--create-only").returncode == 0
    for condition in (("--create-only",), ("--if-match", "2")):
        refused = run("alias", "set", "clialias/a", "cas", "2", *condition)
        assert refused.returncode == 1
        assert "error (precondition-failed): alias 'cas' points at 1" in refused.stderr
    assert run("alias", "set", "clialias/a", "cas", "2", "--if-match", "1").returncode == 0


def test_an_alias_is_rolled_back(run: Run) -> None:
    """To the version that it named before, and back again; both numbers are told."""
    for number in ("1", "2"):
        run("alias", "set", "clialias/a", "live", number)
    assert run("alias", "rollback", "clialias/a@live").stdout == "clialias/a@live: version 1, back from 2\n"
    assert listed(run)["live"] == 1
    told = json.loads(run("alias", "rollback", "clialias/a@live", "--json").stdout)
    assert told == {"alias": "live", "version": 2, "before": 1}


def test_a_rollback_needs_an_alias_with_a_past(run: Run, server: Server) -> None:
    """What is no alias, one that was only made: each says what to do. A key of scope `write` is enough."""
    run("alias", "set", "clialias/a", "fresh", "1")
    for name, words in (
        ("clialias/a", "names no alias: write it as clialias/a@prod"),
        ("clialias/a@1", "names no alias"),
        ("clialias/a@latest", "would be taken for a version"),
        ("clialias/a@nothing", "has no alias 'nothing'"),
        ("clialias/a@fresh", "no version that clialias/a@fresh named before 1: point it at a version by its number"),
    ):
        failed = run("alias", "rollback", name)
        assert failed.returncode == 1
        assert words in failed.stderr
    run("alias", "set", "clialias/a", "fresh", "2")
    writer = {"PREFIX_URL": server.url, "PREFIX_API_KEY": server.key("write", "clialias")}
    done = run_command("alias", "rollback", "clialias/a@fresh", environment=writer)
    assert done.stdout == "clialias/a@fresh: version 1, back from 2\n"


def test_what_is_missing_or_wrong_is_told(run: Run) -> None:
    """What the service lacks or refuses is status 1, a version that is no number is wrong use."""
    for arguments, words in (
        (("set", "clialias/a", "prod", "9"), "there is no clialias/a@9"),
        (("rm", "clialias/a", "nothing"), "has no alias 'nothing'"),
        (("set", "clialias/a", "latest", "1"), "would be taken for a version"),
        (("list", "clialias/a@1"), "without @1"),
    ):
        failed = run("alias", *arguments)
        assert failed.returncode == 1
        assert words in failed.stderr
    assert run("alias", "set", "clialias/a", "prod", "two").returncode == 2
