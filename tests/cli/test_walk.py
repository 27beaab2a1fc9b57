"""Walks through the commands in a real terminal, tmux, of 80 and of 120 columns, as a person sees them."""

import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands import PREFIX_SERVICE
from tests.conftest import CORPUS, Server, running_server
from tests.missing import not_tested

LLAMA = CORPUS / "cases" / "llama-n20-emb" / "adapter"
OTHER = CORPUS / "cases" / "llama-n20-proj" / "adapter"
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


class Terminal:
    """A shell in tmux. `pages`, and the file `pages.txt` in the folder, record what each command showed, with lines
    that the terminal broke joined again.
    """

    def __init__(self, columns: int, folder: Path, environment: dict[str, str]) -> None:
        self.columns, self.pages = columns, dict[str, str]()
        self._socket, self._record = folder / "tmux", folder / "pages.txt"
        config = folder / "tmux.conf"
        config.write_text("set -g history-limit 10000\n")
        given = [f"{name}={value}" for name, value in environment.items()]
        shell = [
            "env",
            "-u",
            "COLUMNS",
            "-u",
            "NO_COLOR",
            "PS1=",
            *given,
            "bash",
            "--norc",
            "--noprofile",
            "--noediting",
        ]
        self._tmux("-f", str(config), "new-session", "-d", "-x", str(columns), "-y", "50", *shell)

    def _tmux(self, *arguments: str) -> str:
        command = ["tmux", "-S", str(self._socket), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout

    def run(self, *arguments: str | Path, status: int = 0) -> str:
        """Runs `prefix-service …`, which must end with this status, and returns the page that it showed."""
        typed = " ".join(str(argument) for argument in arguments)
        end = f"command {len(self.pages)} ended with status "
        steps = [
            "clear",
            f"tmux -S {self._socket} clear-history",
            " ".join([*PREFIX_SERVICE, typed]),
            f"echo '{end}'$?",
        ]
        self._tmux("send-keys", "-l", "; ".join(steps))
        self._tmux("send-keys", "Enter")
        until = time.monotonic() + 90
        while not (found := re.search(rf"^{end}(\d+)$", self._shown(), re.MULTILINE)):
            assert time.monotonic() < until, self._shown()
            time.sleep(0.05)
        page = self.pages[typed] = self._shown().partition(end)[0].rstrip()
        with self._record.open("a") as record:
            record.write(f"$ prefix-service {typed}\n{page}\n\n")
        assert int(found[1]) == status, page
        return page

    def _shown(self) -> str:
        return self._tmux("capture-pane", "-p", "-J", "-S", "-")

    def close(self) -> None:
        """Ends the shell and tmux."""
        self._tmux("kill-server")


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Yields a service that only the walk uses, so that its pages show only what the walk did."""
    with running_server(tmp_path_factory.mktemp("walk") / "data") as running:
        yield running


@pytest.fixture(scope="module", params=[80, 120])
def terminal(
    request: pytest.FixtureRequest, own: Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Terminal]:
    """Yields a terminal whose shell has the service's URL and key."""
    if shutil.which("tmux") is None:
        not_tested("tmux is not installed")
    environment = {"PREFIX_URL": own.url, "PREFIX_API_KEY": own.admin_key}
    opened = Terminal(request.param, tmp_path_factory.mktemp("terminal"), environment)
    yield opened
    opened.close()


def require_readable(terminal: Terminal, page: str) -> None:
    """Checks that the terminal breaks only lines of a single word, and that no text is cut into letters."""
    for line in page.splitlines():
        assert len(line) <= terminal.columns or len(line.split()) == 1, line
    letters = [line for line in page.splitlines() if re.fullmatch(r"\s*\S{1,2}\s*", line)]
    assert len(letters) <= 1, page


def test_the_walk(terminal: Terminal, own: Server, tmp_path: Path) -> None:
    """Ids, digests and numbers stay whole on every page of publishing, looking, moving, fetching and managing."""
    name = f"walk{terminal.columns}/capitals-of-the-world"
    first = terminal.run("publish", LLAMA, name)
    assert f"published {name}@1" in first
    assert DIGEST.search(first)
    terminal.run("publish", OTHER, name)
    terminal.run("alias", "set", name, "prod", "1")

    versions = terminal.run("versions", name)
    assert len(DIGEST.findall(versions)) == 2
    assert DIGEST.search(terminal.run("inspect", name))
    listing = terminal.run("list", name.partition("/")[0])
    assert "capitals-of-the-world" in listing
    assert "prod=1" in listing
    saved = terminal.run("fetch", f"{name}@prod", "-o", tmp_path / "prefix.safetensors")
    assert f"saved to {tmp_path}/prefix.safetensors" in " ".join(saved.split())

    terminal.run("tenant", "set", name.partition("/")[0], "--max-bytes", "10GiB", "--max-adapters", "1000")
    assert "of 10.0 GiB" in terminal.run("tenant", "list")
    terminal.run("residency", "load", f"{name}@1", "--pin")
    assert f"{name}@1" in terminal.run("residency")

    audit = terminal.run("audit")
    entries = own.client().get("/v1/audit").json()["items"]
    assert all(entry["key_id"] in audit and entry["target"] in audit for entry in entries)
    assert len(audit.splitlines()) <= 6 * len(entries) + 3
    keys = terminal.run("key", "list", "--platform", "--data-dir", own.data_dir)
    assert entries[0]["key_id"] in keys

    terminal.run("doctor")
    terminal.run("bench", name, "--seconds", "0.2")
    failed = terminal.run("inspect", f"{name}@nothing", status=1)
    assert re.search(r"^error \(not-found\): .* \(request [0-9a-f]{32}\)$", " ".join(failed.split()))
    assert '"request_id"' in terminal.run("inspect", f"{name}@nothing", "--json", status=1)
    terminal.run("frobnicate", status=2)
    for command in ("", "serve", "publish", "key", "tenant set"):
        shown = terminal.run(*command.split(), "--help")
        assert "Usage: " in shown

    tables = ("versions", "inspect", "list", "tenant list", "residency", "audit", "key list", "doctor", "bench")
    for typed in (*tables, "--help"):
        require_readable(terminal, next(page for each, page in terminal.pages.items() if each.startswith(typed)))


def test_who_waits_sees_for_whom(terminal: Terminal) -> None:
    """For a service that accepts and never answers, a command shows its address while it waits, then an error."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        shown = terminal.run("list", "acme", "--url", url, status=1)
    failed = f"error (connection-failed): {url} did not answer in time: timed out"
    said, _, request = " ".join(shown.split()).partition(" (request ")
    assert said == f"waiting for {url} … {failed}"
    assert re.fullmatch(r"[0-9a-f]{32}\)", request)
