"""Runs schemathesis on the committed OpenAPI document with all checks, with a key and without one."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx

from tests.api.helpers import CONFIG
from tests.conftest import running_server

_ROOT: Final = Path(__file__).parents[2]
DOCUMENT: Final = _ROOT / "openapi" / "openapi.json"


@dataclass(frozen=True, slots=True)
class Report:
    """Schemathesis's output and exit status, and the service's log."""

    text: str
    status: int
    log: str


def fuzzed(folder: Path, examples: int, seed: int, *, with_key: bool) -> Report:
    """Tries every operation with so many examples in each phase, on a service of its own."""
    with running_server(folder / "data") as server:
        (folder / "schemathesis.toml").write_text(_SETTINGS)
        command = [sys.executable, "-m", "schemathesis.cli", "run", str(DOCUMENT), "--url", server.url]
        command += ["--phases", "examples,coverage,fuzzing,stateful", "--checks", "all", "--mode", "all"]
        command += ["--max-examples", str(examples), "--seed", str(seed), "--no-color"]
        if with_key:
            command += ["--header", f"Authorization: Bearer {server.admin_key}"]
        with server.client() as client:
            existing = json.dumps(_published(client))
        environment = {**os.environ, "SCHEMATHESIS_HOOKS": "tests.fuzz.schema_hooks", "FUZZ_EXISTING": existing}
        environment["PYTHONPATH"] = os.pathsep.join((str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])))
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)
        return Report(done.stdout + done.stderr, done.returncode, server.log.read_text())


def _published(client: httpx.Client) -> dict[str, dict[str, str]]:
    """Publishes adapters, and returns parameters of what exists: for every operation, and for some by their path."""
    since = client.get("/v1/changes").raise_for_status().json()["revision"]
    for adapter in ("acme/summarize", "acme/deleted", "other/summarize", "gone/summarize"):
        tenant, _, name = adapter.partition("/")
        for seed in range(3):
            body = {"config": CONFIG, "seed": seed}
            client.post(f"/v1/tenants/{tenant}/adapters/{name}/versions", json=body).raise_for_status()
        client.put(f"/v1/tenants/{tenant}/adapters/{name}/residency").raise_for_status()
    client.put("/v1/tenants/acme/adapters/summarize/aliases/prod", json={"version": 1}).raise_for_status()
    return {
        "": {"tenant": "acme", "name": "summarize", "ref": "summarize", "version": "1"},
        "GET /v1/tenants/{tenant}/adapters/{name}/aliases/{alias}": {"alias": "prod"},
        "DELETE /v1/tenants/{tenant}/adapters/{ref}": {"ref": "deleted"},
        "GET /v1/changes": {"since": since},
        "POST /ui/session": {"origin": str(client.base_url).rstrip("/")},
        # With quotas, the tenant that the other operations use would refuse them everything.
        "PUT /v1/tenants/{tenant}": {"tenant": "other"},
        "DELETE /v1/tenants/{tenant}": {"tenant": "gone"},
        "GET /v1/keys/{key_id}": {"key_id": _key(client, "/v1/keys")},
        "PUT /v1/keys/{key_id}": {"key_id": _key(client, "/v1/keys")},
        "GET /v1/tenants/{tenant}/keys/{key_id}": {"key_id": _key(client, "/v1/tenants/acme/keys")},
        "PUT /v1/tenants/{tenant}/keys/{key_id}": {"key_id": _key(client, "/v1/tenants/acme/keys")},
        **{f"GET {path}": {"cursor": _cursor(client, path)} for path in _listings()},
    }


def _key(client: httpx.Client, path: str) -> str:
    made = [client.post(path, json={"scope": "read"}).raise_for_status().json()["id"] for _ in range(2)]
    return str(made[0])


def _listings() -> list[str]:
    paths: dict[str, Any] = json.loads(DOCUMENT.read_text())["paths"]
    return [
        path
        for path, item in paths.items()
        if any(parameter["name"] == "cursor" for parameter in item.get("get", {}).get("parameters", []))
    ]


def _cursor(client: httpx.Client, path: str) -> str:
    page = client.get(path.format(tenant="acme", name="summarize"), params={"limit": 1}).raise_for_status()
    found: str = page.json()["next"]
    return found


_SETTINGS: Final = """
[checks]
negative_data_rejection.expected-statuses = [400, 401, 404, 405, 406, 412, 413, 414, 415, 422, 429]

# A condition that does not hold is no fault of the request.
[[operations]]
include-path-regex = "/aliases/"
checks.positive_data_acceptance.expected-statuses = ["2xx", 401, 404, 412]

[[operations]]
include-name = "GET /v1/tenants/{tenant}/adapters/{ref}/card"
checks.positive_data_acceptance.expected-statuses = ["2xx", 304, 401, 404]

[[operations]]
include-path-regex = "/(annotations|base-model|config|statistics)$"
checks.positive_data_acceptance.expected-statuses = ["2xx", 304, 401, 404, 412]

# Any body that comes as text/markdown is text.
[[operations]]
include-name = "PUT /v1/tenants/{tenant}/adapters/{ref}/card"
checks.negative_data_rejection.expected-statuses = ["2xx", 400, 401, 404, 405, 406, 412, 413, 414, 415, 422, 429]
checks.positive_data_acceptance.expected-statuses = ["2xx", 401, 404, 412]

# A cursor belongs to the order and the search that returned it.
[[operations]]
include-path-regex = "/adapters$"
checks.positive_data_acceptance.expected-statuses = ["2xx", 401, 404, 422]

# Layers, heads and ranks are those of the adapter; the rows of a mask have one length, and are the batch. Versions that
# are compared have one shape.
[[operations]]
include-path-regex = "/(prefix(es)?|compare)$"
checks.positive_data_acceptance.expected-statuses = ["2xx", 304, 401, 404, 416, 422]

# A range that begins behind the end.
[[operations]]
include-path-regex = "/parameters$"
checks.positive_data_acceptance.expected-statuses = ["2xx", 304, 401, 404, 416]

# The shape of an input says how many elements its data has.
[[operations]]
include-path-regex = "/infer$"
checks.positive_data_acceptance.expected-statuses = ["2xx", 400, 401, 404]

# An end is in the future, and not later than the key's present one.
[[operations]]
include-path-regex = "/keys"
checks.positive_data_acceptance.expected-statuses = ["2xx", 401, 404, 409, 422]

# PEFT decides which configs are valid, and whether weights fit them.
[[operations]]
include-operation-id = "publish"
checks.positive_data_acceptance.expected-statuses = ["2xx", 401, 404, 422]
"""
