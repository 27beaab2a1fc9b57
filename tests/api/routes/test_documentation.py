"""The OpenAPI document is committed, complete, and true of the running service."""

import json
import re
from collections.abc import Iterator
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import httpx
import pytest

from prefix_service.api.http.paths import REFERENCE_FILES
from prefix_service.api.http.public_pages import CONTENT_SECURITY_POLICY
from tests.conftest import Server
from tests.forked import run_forked

COMMITTED = Path(__file__).parents[3] / "openapi" / "openapi.json"
SWAGGER_UI = Path(__file__).parents[3] / "service" / "prefix_service" / "api" / "swagger_ui"
PUBLIC = {"/livez", "/readyz", "/v2/health/live", "/v2/health/ready", "/", "/ui/session"}
METHODS = {"get", "put", "post", "delete", "head"}


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    """Returns the committed document."""
    found: dict[str, Any] = json.loads(COMMITTED.read_text())
    return found


def test_the_committed_document_is_current() -> None:
    """`prefix-service openapi` prints the committed document; it is made again when routes change."""
    printed = run_forked("openapi")
    assert printed.returncode == 0, printed.stderr
    assert printed.stdout == COMMITTED.read_text()


def test_it_is_what_the_service_shows(server: Server, document: dict[str, Any]) -> None:
    """The public route returns the committed document."""
    assert httpx.get(f"{server.url}/openapi.json").json() == document


def test_every_operation_tells_its_errors(document: dict[str, Any]) -> None:
    """Every operation's errors are problem documents, and nothing else."""
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
    """Every operation but the public ones needs the bearer key."""
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
    """The document has all options, in the query and in the JSON body, and the headers that count."""
    path = document["paths"]["/v1/tenants/{tenant}/adapters/{ref}/prefix"]
    options = {"batch_size", "dtype", "key_dtype", "value_dtype", "layout", "layers", "kv_heads", "tp", "mask_dtype"}
    options.add("expand")
    for method in ("get", "head", "post"):
        assert {p["name"] for p in path[method]["parameters"] if p["in"] == "query"} == options
    named = {p["name"] for p in path["get"]["parameters"] if p["in"] == "header"}
    assert named == {"If-None-Match", "Range", "If-Range", "Want-Repr-Digest"}
    content = path["post"]["requestBody"]["content"]
    assert content.keys() == {"application/json", "application/vnd.safetensors"}
    assert content["application/json"]["schema"]["properties"].keys() == options | {"attention_mask"}


def test_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    """Each `$ref` names a schema of this document."""

    def references(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            yield from (value for key, value in node.items() if key == "$ref")
            for value in node.values():
                yield from references(value)
        elif isinstance(node, list):
            for value in node:
                yield from references(value)

    known = {f"#/components/schemas/{name}" for name in document["components"]["schemas"]}
    assert set(references(document)) <= known


class _Page(HTMLParser):
    """Collects what a page loads, and what a strict policy forbids inside it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.inside: list[str] = []
        self._script = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self._script = tag == "script"
        self.loaded += [address for name in ("src", "href") if tag != "a" and (address := given.get(name))]
        self.inside += [name for name in given if name == "style" or name.startswith("on")] + [tag] * (tag == "style")

    def handle_data(self, data: str) -> None:
        if self._script and data.strip():
            self.inside.append(data)


def test_the_reference_works_without_the_internet(server: Server) -> None:
    """The page loads only this service's files, under a policy that allows no others, and has no inline script."""
    with httpx.Client(base_url=server.url) as client:
        answer = client.get("/docs")
        page = _Page(answer.text)
        assert page.inside == []
        paths = {urljoin("/docs", address) for address in page.loaded}
        assert paths == REFERENCE_FILES.keys() - {"/docs"}
        for path in sorted({"/docs", *paths}):
            file = client.get(path)
            assert file.status_code == 200
            assert file.headers["content-security-policy"] == CONTENT_SECURITY_POLICY
            assert file.headers["x-content-type-options"] == "nosniff"
            assert file.headers["content-type"] == REFERENCE_FILES[path][1]
            assert file.content == (SWAGGER_UI / REFERENCE_FILES[path][0]).read_bytes()
        (document,) = re.findall(r'url: "(.+)"', client.get("/docs/start.js").text)
        assert client.get(urljoin("/docs", document)).json()["openapi"]


def test_the_policy_is_strict() -> None:
    """The policy allows scripts and styles from this service, none inside a page, and nothing by default."""
    policy = dict(rule.strip().split(" ", 1) for rule in CONTENT_SECURITY_POLICY.split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert "unsafe" not in CONTENT_SECURITY_POLICY
    assert "http" not in CONTENT_SECURITY_POLICY


def test_the_copies_of_swagger_ui_are_what_the_registry_has() -> None:
    """README lists the hash of each copied file, and the version of the package."""
    readme = (SWAGGER_UI / "README.md").read_text()
    listed = dict(re.findall(r"^\| `(.+)` \| `([0-9a-f]{64})` \|$", readme, re.MULTILINE))
    ours = {"README.md", "page.html", "start.js"}
    copies = {
        file.name: sha256(file.read_bytes()).hexdigest() for file in SWAGGER_UI.iterdir() if file.name not in ours
    }
    assert copies == listed
    assert "5.35.0 (Apache-2.0" in readme
    assert "sha512-" in readme
