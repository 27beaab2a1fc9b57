"""The OpenAPI document: committed, complete, and true of the running service."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.api.helpers import CONFIG, assert_alive
from tests.conftest import PREFIX_SERVICE, Server

COMMITTED = Path(__file__).parents[2] / "openapi" / "openapi.json"
PUBLIC = {"/livez", "/readyz", "/v2/health/live", "/v2/health/ready"}
METHODS = {"get", "put", "post", "delete", "head"}


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    """The committed document."""
    found: dict[str, Any] = json.loads(COMMITTED.read_text())
    return found


def test_the_committed_document_is_current() -> None:
    """`prefix-service openapi` prints what is committed: regenerate it when routes change."""
    printed = subprocess.run([*PREFIX_SERVICE, "openapi"], check=True, capture_output=True, text=True)
    assert printed.stdout == COMMITTED.read_text()


def test_it_is_what_the_service_shows(server: Server, document: dict[str, Any]) -> None:
    """The public route has the same document."""
    assert httpx.get(f"{server.url}/openapi.json").json() == document


def test_every_operation_tells_its_errors(document: dict[str, Any]) -> None:
    """Errors are problem documents, and only that."""
    for item in document["paths"].values():
        for operation in item.values():
            content = operation["responses"]["default"]["content"]
            assert list(content) == ["application/problem+json"]
            assert content["application/problem+json"]["schema"] == {"$ref": "#/components/schemas/Problem"}
            assert "HTTPValidationError" not in json.dumps(operation)


def test_every_operation_has_a_name_and_a_purpose(document: dict[str, Any]) -> None:
    """Operation ids are unique, and each operation says what it does."""
    operations = [operation for item in document["paths"].values() for operation in item.values()]
    names = [operation["operationId"] for operation in operations]
    assert len(set(names)) == len(names)
    assert all(operation["description"] for operation in operations)


def test_keys_are_documented(document: dict[str, Any]) -> None:
    """Every operation needs the bearer key, but for those that are public."""
    assert document["components"]["securitySchemes"]["key"] == {"type": "http", "scheme": "bearer"}
    for path, item in document["paths"].items():
        for operation in item.values():
            needed = operation.get("security", document["security"])
            assert needed == ([] if path in PUBLIC else [{"key": []}])


def test_writes_have_bodies(document: dict[str, Any]) -> None:
    """Bodies that routes read for themselves are in the document too."""
    for path, item in document["paths"].items():
        for method in METHODS & item.keys():
            assert ("requestBody" in item[method]) == (method in ("post", "put")), (method, path)


def test_prefix_options_are_documented(document: dict[str, Any]) -> None:
    """All options of API.md, in the query and in the JSON body, and the headers that count."""
    path = document["paths"]["/v1/tenants/{tenant}/adapters/{ref}/prefix"]
    options = {"batch_size", "dtype", "layout", "layers", "kv_heads", "tp", "mask_dtype", "expand"}
    for method in ("get", "head", "post"):
        assert {p["name"] for p in path[method]["parameters"] if p["in"] == "query"} == options
    named = {p["name"] for p in path["get"]["parameters"] if p["in"] == "header"}
    assert named == {"If-None-Match", "Range", "If-Range", "Want-Repr-Digest"}
    content = path["post"]["requestBody"]["content"]
    assert content.keys() == {"application/json", "application/vnd.safetensors"}
    assert content["application/json"]["schema"]["properties"].keys() == options | {"attention_mask"}


def test_the_service_keeps_to_its_document(server: Server, tmp_path: Path) -> None:
    """Schemathesis finds no 5xx, no undocumented answer, no error that is not a problem document, and nothing
    malformed that is accepted."""
    client = server.client()
    for adapter in ("a", "deleted"):
        client.post(f"/v1/tenants/fuzz/adapters/{adapter}/versions", json={"config": CONFIG})
    (tmp_path / "schemathesis.toml").write_text(_EXISTING)
    command = [sys.executable, "-m", "schemathesis.cli", "run", str(COMMITTED), "--url", server.url, *_OPTIONS]
    command += ["--checks", ",".join(_CHECKS), "--header", f"Authorization: Bearer {server.admin_key}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert_alive(server)
    assert "Traceback" not in server.log.read_text()


_CHECKS = [
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "unsupported_method",
    "ignored_auth",
]
_OPTIONS = ["--phases", "coverage,fuzzing", "--max-examples", "12", "--seed", "1"]

# Names that exist, so that requests reach what is behind the look-up.
_EXISTING = """
[parameters]
"path.tenant" = "fuzz"
"path.name" = "a"
"path.ref" = ["a", "a@1"]
"path.version" = ["1", "latest"]

[[operations]]
include-operation-id = "delete"
parameters = { "path.ref" = "deleted" }
"""
