"""A person and a script get the same facts of an error from every command."""

import json
import re

from tests.cli.conftest import Run
from tests.commands import run_command
from tests.conftest import CORPUS, Server

LLAMA = CORPUS / "cases" / "llama-n20-emb" / "adapter"


def test_errors_of_the_service_name_the_request(run: Run) -> None:
    """The error has the id under which the service's log has the request."""
    failed = run("inspect", "cli/none")
    assert re.fullmatch(r"error \(not-found\): .* \(request [0-9a-f]{32}\)\n", failed.stderr)


def test_json_holds_for_errors_too(run: Run) -> None:
    """With `--json` standard output is one document for wrong usage too; standard error stays as it is."""
    for arguments, status, code, words in (
        (("inspect", "cli/none"), 1, "not-found", "there is no cli/none"),
        (("inspect", "nothing"), 1, "invalid-reference", "nothing"),
        (("inspect",), 2, "wrong-usage", "Missing argument"),
        (("inspect", "cli/none", "--colour"), 2, "wrong-usage", "--colour"),
        (("frobnicate",), 2, "wrong-usage", "frobnicate"),
    ):
        failed = run(*arguments, "--json")
        error = json.loads(failed.stdout)["error"]
        assert (failed.returncode, error["code"]) == (status, code)
        assert words in error["detail"]
        assert words in failed.stderr
        assert (error["request_id"] is not None) == (code == "not-found")


def test_json_holds_for_deletions_too(run: Run) -> None:
    """A deletion with `--json` prints one document that names what was deleted."""
    run("publish", LLAMA, "clijson/a")
    run("alias", "set", "clijson/a", "prod", "1")
    for arguments, document in (
        (("residency", "unload", "clijson/a"), {"unloaded": "clijson/a"}),
        (("alias", "rm", "clijson/a", "prod"), {"deleted": "clijson/a@prod"}),
        (("rm", "clijson/a", "--yes"), {"deleted": "clijson/a"}),
        (("tenant", "rm", "clijson", "--yes"), {"deleted": "clijson"}),
    ):
        assert json.loads(run(*arguments, "--json").stdout) == document


def test_without_a_key_the_command_line_says_where_one_is(server: Server) -> None:
    """In the words of who types, not of HTTP; a wrong key is told as the service tells it."""
    failed = run_command("list", "acme", environment={"PREFIX_URL": server.url})
    words = r"a key is needed: set PREFIX_API_KEY: .* bootstrap.key .*"
    assert re.fullmatch(rf"error \(unauthenticated\): {words} \(request [0-9a-f]{{32}}\)\n", failed.stderr)
    failed = run_command("list", "acme", environment={"PREFIX_URL": server.url, "PREFIX_API_KEY": "wrong"})
    assert "the key is malformed" in failed.stderr
    assert "PREFIX_API_KEY" not in failed.stderr
