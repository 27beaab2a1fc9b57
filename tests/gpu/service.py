"""Runs the tests of the service and the client that need a GPU, wherever they stand, and returns a row for each."""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final
from xml.etree import ElementTree

from tests.gpu.rows import FAILED, NOT_RUN, PASSED, Row
from tests.vllm.driver import ROOT

PART: Final = "service"
_FOLDERS: Final = ("tests/client/transformers", "tests/gpu", "tests/prefix", "tests/registry")
"""Where such tests are."""


def rows() -> list[Row]:
    """Runs every test with the mark `cuda`; one that is skipped is not run."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-m", "cuda", "-q", f"--junit-xml={report}", *_FOLDERS]
        ended = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True)
        if ended.returncode:
            sys.stderr.write(ended.stdout + ended.stderr)  # rows have the first line of each failure alone
        if not report.exists():
            return [Row(PART, "tests with the mark cuda", FAILED, (ended.stdout + ended.stderr)[-400:])]
        cases = list(ElementTree.parse(report).iter("testcase"))  # noqa: S314 - pytest wrote it
    return [_row(case) for case in cases] or [Row(PART, "tests with the mark cuda", FAILED, "there are none")]


def marked() -> set[str]:
    """Returns the files of tests that need a GPU."""
    return {path for path in _files("tests") if "\n@needs_cuda\n" in (ROOT / path).read_text()}


def run_files() -> set[str]:
    """Returns the files of tests that `rows` looks into."""
    return {path for folder in _FOLDERS for path in _files(folder)}


def _files(folder: str) -> set[str]:
    return {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("test_*.py")}


def _row(case: ElementTree.Element) -> Row:
    what, seconds = case.attrib["name"], f"{float(case.attrib['time']):.1f} s"
    for child in case:
        if child.tag in ("failure", "error"):
            return Row(PART, what, FAILED, child.attrib.get("message", "")[:400].replace("\n", " "))
        if child.tag == "skipped":
            return Row(PART, what, NOT_RUN, child.attrib.get("message", ""))
    return Row(PART, what, PASSED, seconds)
