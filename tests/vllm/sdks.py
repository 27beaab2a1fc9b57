"""SDKs as they are, in a process of .venv-vllm's Python, against vLLM's server."""

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from tests.missing import not_tested
from tests.vllm.driver import PYTHON


def row(model: str, question: dict[str, Any], *, header: str | None = None) -> dict[str, Any]:
    """One of the demo's questions for a model, with or without the header that names an adapter."""
    return {"model": model, "question": question["question"], "prompt": question["prompt"], "header": header}


def called(
    client: httpx.Client, key: str, sdk: str, *batches: Sequence[dict[str, Any]], alone: Sequence[str] = ()
) -> Any:
    """What an SDK is answered: for all rows of a batch under way together, batch by batch; for each model of `alone`;
    and for a model that is missing."""
    url = str(client.base_url).rstrip("/")
    asked = {"url": url, "key": key, "sdk": sdk, "batches": list(batches), "alone": list(alone)}
    program = Path(__file__).with_name("callers.py")
    done = subprocess.run(
        [str(PYTHON), str(program)], input=json.dumps(asked) + "\n", check=False, capture_output=True, text=True
    )
    if f"No module named '{sdk}'" in done.stderr:
        not_tested(f"{sdk} is not installed: tests/vllm/install adds it to .venv-vllm")
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])
