"""A part of the API's suite, unchanged, against three replicas behind HAProxy; `pytest tests/api --fleet` runs all."""

import subprocess
import sys
from pathlib import Path
from typing import Final

_ROOT: Final = Path(__file__).parents[2]
_CHOSEN: Final = ("routes/test_adapters.py", "routes/test_publishing.py", "routes/test_tenants.py")
"""Files whose tests share one service: each further one would be a fleet to start."""


def test_the_suite_of_one_service_passes_against_a_fleet() -> None:
    """What clients publish, move, read and list through HAProxy is as with one process."""
    files = [str(_ROOT / "tests" / "api" / name) for name in _CHOSEN]
    command = [sys.executable, "-m", "pytest", "--fleet", "-q", "--tb=short", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-2000:]
    assert "passed on a fleet" in done.stdout
