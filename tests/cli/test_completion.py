"""Completion offers adapters' names as a shell asks for them, and nothing if the service does not answer."""

import time

import pytest

from tests.commands import Finished, run_command
from tests.conftest import CORPUS, Server
from tests.forked import run_forked

LLAMA = CORPUS / "cases" / "llama-n20-emb" / "adapter"


def completed(words: str, **environment: str) -> Finished:
    """Returns what bash is offered for the last of these words."""
    asked = {
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
        "_PREFIX_SERVICE_COMPLETE": "complete_bash",
    }
    return run_forked(environment={**asked, **environment})


@pytest.fixture(scope="module")
def environment(server: Server) -> dict[str, str]:
    """Publishes adapters of two tenants whose names begin alike; returns the environment that leads to them."""
    known = {"PREFIX_URL": server.url, "PREFIX_API_KEY": server.admin_key}
    for adapter in ("clitab-a/capitals", "clitab-a/caps", "clitab-a/my-cap", "clitab-b/x"):
        assert run_command("publish", LLAMA, adapter, environment=known).returncode == 0
    return known


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("prefix-service inspect clitab-", ["clitab-a/", "clitab-b/"]),
        ("prefix-service inspect clitab-a", ["clitab-a/capitals", "clitab-a/caps", "clitab-a/my-cap"]),
        ("prefix-service inspect clitab-a/", ["clitab-a/capitals", "clitab-a/caps", "clitab-a/my-cap"]),
        ("prefix-service inspect clitab-a/cap", ["clitab-a/capitals", "clitab-a/caps"]),
        ("prefix-service pull clitab-a/capi", ["clitab-a/capitals"]),
        ("prefix-service diff clitab-a/caps clitab-b/", ["clitab-b/x"]),
        ("prefix-service alias rollback clitab-b/", ["clitab-b/x"]),
        ("prefix-service inspect clitab-a/nothing", []),
        ("prefix-service inspect clitab-none/", []),
        ("prefix-service inspect clitab-a/../", []),
    ],
)
def test_names_are_offered(environment: dict[str, str], words: str, offered: list[str]) -> None:
    """Completion offers tenants until one matches, then those of its adapters that match."""
    done = completed(words, **environment)
    assert done.stderr == ""
    assert done.stdout.split() == offered


def test_a_tenants_key_completes_its_own_adapters(server: Server, environment: dict[str, str]) -> None:
    """A tenant's key is offered its own adapters, even without its tenant's name, and no others."""
    reader = {**environment, "PREFIX_API_KEY": server.key("read", "clitab-a")}
    assert completed("prefix-service inspect clitab-a/capi", **reader).stdout.split() == ["clitab-a/capitals"]
    own = ["clitab-a/capitals", "clitab-a/caps", "clitab-a/my-cap"]
    for words in ("prefix-service inspect ", "prefix-service inspect clitab-"):
        assert completed(words, **reader).stdout.split() == own
    for words in ("prefix-service inspect clitab-b/", "prefix-service inspect clitab-b"):
        done = completed(words, **reader)
        assert (done.stdout.split(), done.stderr) == ([], "")


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:9", "http://192.0.2.1:8080", "http://prefix.invalid", "no URL", "file:///etc"]
)
def test_a_service_that_is_not_there_is_no_noise(url: str) -> None:
    """Without a service completion offers and prints nothing, and ends within seconds."""
    began = time.monotonic()
    done = completed("prefix-service inspect acme/", PREFIX_URL=url)
    assert (done.stdout.split(), done.stderr) == ([], "")
    assert time.monotonic() - began < 40
