"""The command line as a person types it."""

import os
import pty
import re
import signal
import subprocess
import termios
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.architectures import base
from tests.client.transformers.test_texts import CHATML, tokenizer
from tests.commands import Finished, run_command, run_process
from tests.conftest import Server

Run = Callable[..., Finished]


def on_terminal(
    columns: int, command: Sequence[str | Path], environment: dict[str, str] | None = None, until: str | None = None
) -> tuple[int, str]:
    """Runs a command on a terminal of so many columns. Returns its exit status and what it shows, without styles.

    Once it has shown `until`, it is sent Ctrl+C.
    """
    parent, child = pty.openpty()
    termios.tcsetwinsize(child, (50, columns))
    inherited = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR")}
    process = subprocess.Popen(
        [str(part) for part in command],
        stdin=child,
        stdout=child,
        stderr=child,
        start_new_session=True,
        env={**inherited, "TERM": "xterm", **(environment or {})},
    )
    os.close(child)
    shown = b""
    while piece := _read(parent):
        shown += piece
        if until is not None and until.encode() in shown:
            process.send_signal(signal.SIGINT)
            until = None
    os.close(parent)
    plain = _STYLES.sub("", shown.decode()).replace("\r\n", "\n")
    return process.wait(timeout=90), plain


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # nobody holds the other end any more
        return b""


_STYLES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of a tiny language model with a tokenizer and a chat template."""
    import transformers

    folder = tmp_path_factory.mktemp("model")
    config = base("llama").config.to_dict() | {"vocab_size": len(tokenizer()), "max_position_embeddings": 96}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).save_pretrained(folder)
    tokenizer(CHATML).save_pretrained(folder)
    return folder


@pytest.fixture
def run(server: Server) -> Run:
    """Returns a function that runs a command with the service's URL and admin key; `typed` on a terminal."""

    def run_with_server(*arguments: str | Path, typed: str | None = None) -> Finished:
        environment = {"PREFIX_URL": server.url, "PREFIX_API_KEY": server.admin_key}
        if typed is None:
            return run_command(*arguments, environment=environment)
        keyboard, terminal = pty.openpty()
        os.write(keyboard, typed.encode())
        try:
            return run_process(*arguments, environment=environment, stdin=terminal)
        finally:
            os.close(keyboard)
            os.close(terminal)

    return run_with_server
