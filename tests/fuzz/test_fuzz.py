"""Runs each fuzzer for a few seconds, on the same inputs each time as far as time allows."""

from pathlib import Path
from typing import Literal

import pytest

from tests.fuzz import answers, files, requests, schema


@pytest.mark.parametrize("parser", ["httptools", "h11"])
def test_mutated_requests(tmp_path: Path, parser: Literal["httptools", "h11"]) -> None:
    """The service answers any bytes with a documented status, cheaply, and without a traceback."""
    findings = requests.fuzzed(tmp_path, 3, 1, parser)
    assert findings.faults == {}
    assert findings.statuses["400"] > 0


def test_mutated_files(tmp_path: Path) -> None:
    """The service publishes an uploaded file or refuses it with a documented status."""
    findings = files.fuzzed(tmp_path, 3, 1)
    assert findings.faults == {}
    assert findings.statuses["422"] > 0


def test_mutated_answers() -> None:
    """The client raises documented errors for any answer of a server."""
    findings = answers.fuzzed(3, 1)
    assert findings.faults == {}
    assert sum(findings.statuses.values()) > 10


@pytest.mark.parametrize("with_key", [True, False])
def test_the_service_keeps_to_its_document(tmp_path: Path, *, with_key: bool) -> None:
    """Schemathesis finds no failure with all its checks."""
    report = schema.fuzzed(tmp_path / "first", 2, 1, with_key=with_key)
    if "has not answered within" in report.text:  # a slow machine's catalog; a fault of the service comes again
        report = schema.fuzzed(tmp_path / "second", 2, 1, with_key=with_key)
    assert report.status == 0, report.text[-8000:]
    assert "Traceback" not in report.log
