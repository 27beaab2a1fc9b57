"""The fuzzers in short: a few seconds of each, always the same inputs as far as time allows."""

from pathlib import Path
from typing import Literal

import pytest

from tests.fuzz import answers, files, requests, schema


@pytest.mark.parametrize("parser", ["httptools", "h11"])
def test_mutated_requests(tmp_path: Path, parser: Literal["httptools", "h11"]) -> None:
    """Whatever bytes arrive, the answer is documented, cheap, and no traceback."""
    findings = requests.fuzzed(tmp_path, 3, 1, parser)
    assert findings.faults == {}
    assert findings.statuses["400"] > 0


def test_mutated_files(tmp_path: Path) -> None:
    """Whatever is uploaded is published or refused with a documented status."""
    findings = files.fuzzed(tmp_path, 3, 1)
    assert findings.faults == {}
    assert findings.statuses["422"] > 0


def test_mutated_answers() -> None:
    """Whatever a server answers, the client raises its documented errors."""
    findings = answers.fuzzed(3, 1)
    assert findings.faults == {}
    assert sum(findings.statuses.values()) > 10


@pytest.mark.parametrize("with_key", [True, False])
def test_the_service_keeps_to_its_document(tmp_path: Path, *, with_key: bool) -> None:
    """Schemathesis finds no failure with all its checks."""
    report = schema.fuzzed(tmp_path, 2, 1, with_key=with_key)
    assert report.status == 0, report.text[-8000:]
    assert "Traceback" not in report.log
