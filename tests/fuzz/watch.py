"""Watches the answers' statuses, the processor time of each request, and the log."""

import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from prefix_service.api.http.problems import STATUSES
from tests.conftest import Server

DOCUMENTED: Final = frozenset({100, 200, 201, 204, 206, 304, 400, 405, *STATUSES.values()}) - {500}
MOST_SECONDS: Final = 1.0
"""The most processor time for one request of a few kilobytes."""


@dataclass
class Findings:
    """Counts answers by status, and keeps each kind of fault once, with an example that reproduces it."""

    statuses: Counter[str] = field(default_factory=Counter)
    faults: dict[str, bytes] = field(default_factory=dict)

    def count(self, status: int | None, sent: bytes) -> None:
        """Counts an answer; None stands for a connection that ended or stayed silent."""
        self.statuses[str(status or "none")] += 1
        if status is not None and status not in DOCUMENTED:
            self.faults.setdefault(f"answered {status}", sent)


def rounds(seconds: float, least: int = 30) -> Iterator[None]:
    """Yields for so long, and at least so many times: a slow machine does little in a few seconds."""
    until, done = time.monotonic() + seconds, 0
    while time.monotonic() < until or done < least:
        yield
        done += 1


@contextmanager
def watched(server: Server, findings: Findings, sent: bytes) -> Iterator[None]:
    """Notes, after the block has sent one request, a process that died or that computed for too long."""
    before = _processor_seconds(server)
    yield
    if server.process.poll() is not None:
        findings.faults.setdefault(f"the process died: {server.process.returncode}", sent)
    elif (seconds := _processor_seconds(server) - before) > MOST_SECONDS:
        findings.faults.setdefault(f"{seconds:.1f} seconds of processor time", sent)


def look_at_log(server: Server, findings: Findings) -> None:
    """Notes tracebacks in the log."""
    log = server.log.read_bytes()
    if (at := log.find(b"Traceback")) >= 0:
        findings.faults.setdefault("a traceback in the log", log[max(at - 500, 0) : at + 3000])


def _processor_seconds(server: Server) -> float:
    try:
        fields = Path(f"/proc/{server.process.pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
