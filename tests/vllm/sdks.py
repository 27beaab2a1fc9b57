"""Calls vLLM's server by unchanged SDKs, in a process of .venv-vllm's Python."""

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from tests.missing import not_tested
from tests.vllm.driver import PYTHON


def row(model: str, question: dict[str, Any], *, header: str | None = None) -> dict[str, Any]:
    """Returns one of the demo's questions for a model, with or without the header that names an adapter."""
    return {"model": model, "question": question["question"], "prompt": question["prompt"], "header": header}


def called(
    client: httpx.Client, key: str, sdk: str, rows: Sequence[dict[str, Any]] = (), *, alone: Sequence[str] = ()
) -> Any:
    """Returns an SDK's answers: for all rows, sent together; for each model of `alone`; and for a missing model."""
    url = str(client.base_url).rstrip("/")
    asked = {"url": url, "key": key, "sdk": sdk, "rows": list(rows), "alone": list(alone)}
    program = Path(__file__).with_name("callers.py")
    done = subprocess.run(
        [str(PYTHON), str(program)], input=json.dumps(asked) + "\n", check=False, capture_output=True, text=True
    )
    if f"No module named '{sdk}'" in done.stderr:
        not_tested(f"{sdk} is not installed: tests/vllm/install adds it to .venv-vllm")
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])
