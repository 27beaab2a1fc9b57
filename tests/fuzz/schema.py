"""Schemathesis on the committed OpenAPI document: all checks, with a key and without one."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.api.helpers import CONFIG
from tests.conftest import Server, running_server

DOCUMENT: Final = Path(__file__).parents[2] / "openapi" / "openapi.json"


@dataclass(frozen=True, slots=True)
class Report:
    """What schemathesis wrote and how it ended, and the service's log."""

    text: str
    status: int
    log: str


def fuzzed(folder: Path, examples: int, seed: int, *, with_key: bool) -> Report:
    """Try every operation with so many examples in each phase, on a service of its own."""
    with running_server(folder / "data") as server:
        (folder / "schemathesis.toml").write_text(_SETTINGS)
        _prepare(server)
        command = [sys.executable, "-m", "schemathesis.cli", "run", str(DOCUMENT), "--url", server.url]
        command += ["--phases", "examples,coverage,fuzzing,stateful", "--checks", "all", "--mode", "all"]
        command += ["--max-examples", str(examples), "--seed", str(seed), "--no-color"]
        if with_key:
            command += ["--header", f"Authorization: Bearer {server.admin_key}"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
        return Report(done.stdout + done.stderr, done.returncode, server.log.read_text())


def _prepare(server: Server) -> None:
    with server.client() as client:
        for adapter in ("a", "deleted"):
            made = client.post(f"/v1/tenants/fuzz/adapters/{adapter}/versions", json={"config": CONFIG})
            made.raise_for_status()


# Names that exist, so that requests reach what is behind the look-up.
_SETTINGS: Final = """
[parameters]
"path.tenant" = "fuzz"
"path.name" = "a"
"path.ref" = "a"
"path.version" = "1"

[[operations]]
include-operation-id = "delete"
parameters = { "path.ref" = "deleted" }
"""
