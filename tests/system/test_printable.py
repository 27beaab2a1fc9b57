"""`system.printable` escapes characters that control a terminal or deceive its reader."""

import json
import os
import pty
import subprocess
import sys
import unicodedata

import pytest

from prefix_service.system.printable import printable, printable_lines

CLIPBOARD = "\x1b]52;c;ZXZpbA==\x07"
HOSTILE = f"{CLIPBOARD}\u202egnp.exe\x9b31m\x7f\u2028"
CONTROLS_OF_DIRECTION = set("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def test_every_control_is_escaped_and_nothing_else() -> None:
    """All of Unicode's controls, those of direction too, are escaped; letters and signs of every script stay."""
    for character in map(chr, range(0x30000)):
        escaped = printable(character) != character
        kind = unicodedata.category(character)
        assert escaped == (kind in ("Cc", "Cs", "Zl", "Zp") or character in CONTROLS_OF_DIRECTION), ascii(character)
        assert (printable_lines(character) != character) == (escaped and character != "\n")
    assert printable(HOSTILE) == "\\u001b]52;c;ZXZpbA==\\u0007\\u202egnp.exe\\u009b31m\\u007f\\u2028"


def test_json_keeps_its_meaning() -> None:
    """Escaped JSON parses to the value that was written."""
    value = {HOSTILE: [HOSTILE, {"x": "\ud800 é日本"}]}
    shown = printable_lines(json.dumps(value, indent=2, ensure_ascii=False))
    assert json.loads(shown) == value
    assert printable(shown.replace("\n", "")) == shown.replace("\n", "")
    assert "é日本" in shown


CALLS = {
    "table": "console.print_table(text, [text, 'b'], [[text, 1], ['[red]x[/red]', 2]])",
    "fields": "console.print_fields(text, {text: text, 'b': text * 9})",
    "json": "console.print_json({text: [text]})",
    "say": "console.say(text)",
    "note": "console.note(text)",
    "complain": "console.complain(text)",
}
ON_A_TERMINAL = {
    "working": "with console.working(text): import time; time.sleep(0.5)",
    "question": "options.confirm(text, yes=False)",
}
SAYINGS = [
    *(
        pytest.param(call, is_terminal, id=f"{name} {is_terminal}")
        for name, call in CALLS.items()
        for is_terminal in (True, False)
    ),
    *(pytest.param(call, True, id=name) for name, call in ON_A_TERMINAL.items()),
]


@pytest.mark.parametrize(("call", "is_terminal"), SAYINGS)
def test_all_that_the_command_line_says(call: str, is_terminal: bool) -> None:
    """The command line escapes everything that it prints, on a terminal and in a pipe."""
    code = f"from prefix_service.cli import console, options; text = {HOSTILE!r}\n{call}"
    shown = _on_terminal(code) if is_terminal else _in_a_pipe(code)
    assert "52;c;ZXZpbA==" in shown
    assert CLIPBOARD not in shown
    assert not {"\u202e", "\x9b", "\x7f", "\u2028"} & set(shown)


LOGS = """
import logging, structlog
from prefix_service.logs import configure
text = {text!r}
configure("info")
structlog.stdlib.get_logger("prefix_service").info(text, value=text, nested={{"deep": [text]}})
change = {{"action": text, "target": text, "details": {{"name": text}}, "key_id": text}}
logging.getLogger("prefix_service").info("audit", extra=change)
logging.getLogger("uvicorn.error").error("%s", text)
try:
    raise ValueError(text)
except ValueError:
    logging.getLogger("prefix_service").exception("failed")
"""


@pytest.mark.parametrize("is_terminal", [True, False])
def test_all_that_the_service_logs(is_terminal: bool) -> None:
    """The log escapes events, values, nested values, arguments and exceptions, on a terminal and in a pipe."""
    code = LOGS.format(text=HOSTILE)
    shown = _on_terminal(code) if is_terminal else _in_a_pipe(code)
    assert shown.count("52;c;ZXZpbA==") >= 6
    assert CLIPBOARD not in shown
    assert not {"\u202e", "\x9b", "\x7f", "\u2028"} & set(shown)


def _on_terminal(code: str) -> str:
    """Returns what a process shows on a terminal, its own colours included."""
    parent, child = pty.openpty()
    os.write(parent, b"n\n")
    environment = {**os.environ, "TERM": "xterm-256color"}
    subprocess.run([sys.executable, "-c", code], check=False, stdin=child, stdout=child, stderr=child, env=environment)
    os.close(child)
    shown = b""
    while True:
        try:
            shown += os.read(parent, 65536)
        except OSError:  # the end of a terminal
            break
    os.close(parent)
    return shown.decode().replace("\r\n", "\n")


def _in_a_pipe(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, stdin=subprocess.DEVNULL)
    return done.stdout.decode() + done.stderr.decode()
