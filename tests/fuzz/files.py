"""Uploads mutated weights, configs and pickles to a real service."""

import random
from pathlib import Path

import httpx

from tests.client.damaged import damaged, originals
from tests.conftest import running_server
from tests.fuzz.watch import Findings, look_at_log, rounds, watched

_CONFIG, _BASE, _WEIGHTS = "adapter_config.json", "config.json", "adapter_model.safetensors"


def fuzzed(folder: Path, seconds: float, seed: int) -> Findings:
    """Uploads mutated files for so long to a service of its own, pickles as weights."""
    findings, draw = Findings(), random.Random(seed)  # noqa: S311 - reproducible, not secret
    sound = originals()
    with running_server(folder / "data") as server, server.client() as client:
        client.put("/v1/tenants/acme", json={"max_bytes": 1 << 28}).raise_for_status()
        for _ in rounds(seconds):
            if server.process.poll() is not None:
                break
            name = draw.choice(list(sound))
            data = damaged(draw, sound[name])
            files = {
                "adapter_config.json": data if name == _CONFIG else sound[_CONFIG],
                "base_model_config": data if name == _BASE else sound[_BASE],
                "adapter_model.safetensors": sound[_WEIGHTS] if name in (_CONFIG, _BASE) else data,
            }
            with watched(server, findings, data):
                try:
                    answer = client.post("/v1/tenants/acme/adapters/a/versions", files=files)
                    findings.count(answer.status_code, data)
                except httpx.HTTPError:
                    findings.count(None, data)
        look_at_log(server, findings)
    return findings
