"""`logs` writes every line in one form, whoever logs it, and no key in any."""

import json
import os
import pty
import subprocess
import sys
from typing import Any

import pytest

from prefix_service.logs import redacted

KEY = "pfx_0123456789abcdef_" + "5" * 48 + "_89abcdef"
_BEGIN = """
import logging, structlog, warnings
from prefix_service.logs import configure, request_context
configure({level!r})
log = structlog.stdlib.get_logger("prefix_service")
"""


def _run(code: str, level: str = "info") -> list[dict[str, Any]]:
    """Returns the lines that a process of its own logs, which prints nothing else."""
    command = [sys.executable, "-c", _BEGIN.format(level=level) + code]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout == ""
    return [json.loads(line) for line in done.stderr.splitlines()]


def test_structlog_and_the_standard_library_write_the_same_form() -> None:
    """Both write lines of JSON with time, level and the bound values."""
    lines = _run("""
request_context.set({"request_id": "r1", "key_id": "k1"})
log.info("audit", action="create", tenant="acme")
logging.getLogger("prefix_service").warning("the values of %s are lost", "acme/a@1")
logging.getLogger("uvicorn.error").error("no")
warnings.warn("old")
""")
    assert [(line["event"].splitlines()[0][-29:], line["level"]) for line in lines[:3]] == [
        ("audit", "info"),
        ("the values of acme/a@1 are lost"[-29:], "warning"),
        ("no", "error"),
    ]
    assert (lines[0]["action"], lines[0]["tenant"]) == ("create", "acme")
    assert "old" in lines[3]["event"]
    for line in lines:
        assert (line["request_id"], line["key_id"]) == ("r1", "k1")
        assert line["timestamp"].endswith("Z")


def test_levels() -> None:
    """Lines below the level are dropped; other libraries are logged from warnings on, at debug too."""
    code = """
for name in ("prefix_service", "sqlalchemy.engine", "alembic"):
    logging.getLogger(name).debug(name)
    logging.getLogger(name).info(name)
    logging.getLogger(name).warning(name)
log.debug("mine")
"""
    assert [(line["event"], line["level"]) for line in _run(code, "debug")] == [
        ("prefix_service", "debug"),
        ("prefix_service", "info"),
        ("prefix_service", "warning"),
        ("sqlalchemy.engine", "warning"),
        ("alembic", "warning"),
        ("mine", "debug"),
    ]
    assert [line["level"] for line in _run(code, "error")] == []


def test_a_traceback_is_one_line() -> None:
    """An exception stays in the line of its event, whoever logs it."""
    lines = _run("""
try:
    1 / 0
except ZeroDivisionError as error:
    log.error("mine", exc_info=error)
    logging.getLogger("prefix_service").exception("theirs")
""")
    assert [line["event"] for line in lines] == ["mine", "theirs"]
    for line in lines:
        assert line["exception"].startswith("Traceback")
        assert line["exception"].endswith("ZeroDivisionError: division by zero")


def test_passwords_in_urls_are_redacted() -> None:
    """Whatever library writes the URL; an address without a password stays."""
    assert redacted("to postgresql+psycopg://me:hunter2@db/x now") == "to postgresql+psycopg://me:***@db/x now"
    assert redacted("at http://127.0.0.1:8080/docs, a@b") == "at http://127.0.0.1:8080/docs, a@b"


@pytest.mark.parametrize("length", [4, 5, 12, 30, 60, len(KEY)])
def test_keys_are_redacted_whole_or_cut_off(length: int) -> None:
    """A key that a message has cut off is redacted like a whole one."""
    text = redacted(f"got '{KEY[:length]}', twice {KEY[:length]}")
    expected = "pfx_***" if length > 4 else "pfx_"
    assert text == f"got '{expected}', twice {expected}"
    assert redacted("it should look like pfx_…, copied whole") == "it should look like pfx_…, copied whole"


def test_no_key_is_logged_wherever_it_is() -> None:
    """A key is redacted in an event, a value, a name, the context, an exception, or another library's arguments."""
    lines = _run(f"""
key = {KEY!r}
request_context.set({{"request_id": key}})
log.info(key, value=key, nested={{"deep": [key]}}, **{{key: 1}})
logging.getLogger("uvicorn.error").error("%s", key)
try:
    raise ValueError(key)
except ValueError:
    log.exception("failed")
""")
    assert len(lines) == 3
    assert "pfx_0" not in json.dumps(lines)
    assert "55555" not in json.dumps(lines)


def test_a_terminal_gets_lines_for_people() -> None:
    """A terminal gets no JSON, no keys, and tracebacks without the values of variables."""
    parent, child = pty.openpty()
    code = f"""
secret = {KEY!r}
other = "a local value"
log.info("hello", key=secret)
try:
    raise ValueError(secret)
except ValueError:
    log.exception("failed")
"""
    subprocess.run([sys.executable, "-c", _BEGIN.format(level="info") + code], check=True, stderr=child)
    os.close(child)
    shown = os.read(parent, 65536).decode()
    os.close(parent)
    assert "hello" in shown
    assert "Traceback" in shown
    assert not shown.startswith("{")
    assert "5555" not in shown
    assert "a local value" not in shown


def test_a_terminal_gets_readable_lines_of_requests() -> None:
    """A line has the request and its outcome, the prefix, where the time went, and the id of an error."""
    parent, child = pty.openpty()
    code = """
from prefix_service.logs import RequestLog
plain = {"method": "GET", "route": "/v1/x", "status": 200, "seconds": 0.0123, "bytes": 7, "code": None}
times = {"cold": True, "prepare_seconds": 0.001, "load_seconds": 0.002, "send_seconds": 0.0093}
requests = RequestLog()
requests.write("info", dict(plain))
requests.write("info", {**plain, **times, "tenant": "acme", "adapter": "a", "version": 7})
requests.write("info", {**plain, **times, "cold": False, "versions": ["acme/a@7", "acme/b@1"], "num_versions": 17})
requests.write("info", {**plain, "status": 404, "code": "not-found", "request_id": "r1"})
"""
    subprocess.run([sys.executable, "-c", _BEGIN.format(level="info") + code], check=True, stderr=child)
    os.close(child)
    shown = [line.partition(" ")[2] for line in os.read(parent, 65536).decode().splitlines()]
    os.close(parent)
    assert shown == [
        "200 GET /v1/x 12.3 ms 7 B",
        "200 GET /v1/x 12.3 ms 7 B acme/a@7 (cold: prepare 1.0 ms, load 2.0 ms, send 9.3 ms)",
        "200 GET /v1/x 12.3 ms 7 B acme/a@7 and 16 more (warm: prepare 1.0 ms, load 2.0 ms, send 9.3 ms)",
        "404 GET /v1/x 12.3 ms 7 B not-found r1",
    ]


def test_a_terminal_gets_readable_lines_of_changes() -> None:
    """What was done to what, and by whom; what its tenant wrote is escaped."""
    parent, child = pty.openpty()
    code = """
by = {"tenant": "acme", "actor": "acme", "key_id": "0f07", "request_id": "r1"}
change = {"action": "version.published", "target": "acme/a@1", "details": {"digest": "sha256:00"}}
log.info("audit", extra={**by, **change})
change = {"action": "key.created", "target": "22dc", "details": {"scope": "read", "name": "a\\x1b[2J\\nb"}}
log.info("audit", extra={**by, **change})
change = {"action": "alias.moved", "target": "acme/a@prod", "details": {"version": 1, "before": None}}
log.info("audit", extra={**by, **change})
"""
    begin = _BEGIN.format(level="info") + 'log = logging.getLogger("prefix_service")'
    subprocess.run([sys.executable, "-c", begin + code], check=True, stderr=child)
    os.close(child)
    shown = [line.partition(" ")[2] for line in os.read(parent, 65536).decode().splitlines()]
    os.close(parent)
    assert shown == [
        "version.published acme/a@1 by key 0f07",
        r"key.created 22dc scope=read name=a\u001b[2J\u000ab by key 0f07",
        "alias.moved acme/a@prod version=1 by key 0f07",
    ]


def test_a_log_that_cannot_be_written_fails_nothing() -> None:
    """A full disk under the log does not undo what was logged."""
    code = (
        _BEGIN.format(level="info")
        + """
log.info("one")
logging.getLogger("prefix_service").info("two")
print("done")
"""
    )
    with open("/dev/full", "w") as full:  # noqa: PTH123 - a device
        done = subprocess.run([sys.executable, "-c", code], check=False, stdout=subprocess.PIPE, stderr=full, text=True)
    assert (done.returncode, done.stdout) == (0, "done\n")
