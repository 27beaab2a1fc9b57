"""The OpenAPI document, with what FastAPI cannot see in the signatures of routes, and the page that shows it."""

import gzip
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from hashlib import sha256
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from anyio import to_thread
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from prefix_service.api.http.negotiation import is_current, takes_gzip
from prefix_service.api.http.page_files import PAGE_FILES, PAGE_FOLDER
from prefix_service.api.http.paths import REFERENCE_FILES
from prefix_service.api.middleware.auth import PUBLIC

PROBLEM_TYPE: Final = "application/problem+json"
CONTENT_SECURITY_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""What a browser may load for `/docs` and `/ui`: files of this service alone, no script or style inside a page. Swagger
UI's style sheet has its pictures inside itself, as `data:` addresses."""

_SWAGGER_UI: Final = Path(__file__).parents[1] / "swagger_ui"

Document = dict[str, Any]


class Page(Response):
    """Bytes that are the same for every caller, with an entity tag, compressed for who takes that: answers 304 or 200,
    and keeps nothing of a request.

    All answers send the same two objects: those that are not read yet hold no copies.
    """

    def __init__(self, made: Response) -> None:
        super().__init__()
        fields = {
            "Cache-Control": "no-cache",
            "Content-Type": made.headers["content-type"],
            "Content-Security-Policy": CONTENT_SECURITY_POLICY,
            "Vary": "Accept-Encoding",
            "X-Content-Type-Options": "nosniff",
        }
        body = bytes(made.body)
        self._plain = self._answers(body, fields)
        self._compressed = self._answers(gzip.compress(body, mtime=0), {**fields, "Content-Encoding": "gzip"})

    @staticmethod
    def _answers(body: bytes, fields: dict[str, str]) -> tuple[str, Response, Response]:
        """Returns the entity tag of a representation, and its answers 200 and 304."""
        etag = f'"{sha256(body).hexdigest()}"'
        not_modified = Response(status_code=304, headers={"ETag": etag, "Vary": fields["Vary"]})
        return etag, Response(body, headers={"ETag": etag, **fields}), not_modified

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        headers = Headers(raw=scope["headers"])
        etag, answer, not_modified = self._compressed if takes_gzip(headers) else self._plain
        await (not_modified if is_current(headers, etag) else answer)(scope, receive, send)


def pages(app: FastAPI) -> dict[str, Callable[[Request], Awaitable[Response]]]:
    """Returns the endpoints of the public pages by their paths: the document, Swagger UI, which shows it, and the files
    of the page at `/ui`."""
    made: dict[str, Callable[[], Response]] = {"/openapi.json": lambda: JSONResponse(app.openapi())}
    for path, (file, media_type) in REFERENCE_FILES.items():
        made[path] = partial(_read, _SWAGGER_UI / file, media_type)
    for path, (file, media_type) in PAGE_FILES.items():
        made[path] = partial(_read, PAGE_FOLDER / file, media_type)
    return {path: _made_once(make) for path, make in made.items()}


def _read(file: Path, media_type: str) -> Response:
    return Response(file.read_bytes(), media_type=media_type)


def _made_once(make: Callable[[], Response]) -> Callable[[Request], Awaitable[Response]]:
    made: list[Page] = []

    async def answer(_request: Request) -> Response:
        if not made:
            made.append(await to_thread.run_sync(lambda: Page(make())))
        return made[0]

    return answer


def documented(document: Document) -> Document:
    """The document of this API: problems under their own media type, and keys for all but the public routes."""
    document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    document["security"] = [{"key": []}]
    for path, item in document["paths"].items():
        for operation in item.values():
            problems = operation["responses"]["default"]["content"]
            problems[PROBLEM_TYPE] = problems.pop("application/json")
            if path in PUBLIC:
                operation["security"] = []
            else:
                operation["responses"] |= {
                    str(status): response for status, response in refusals({401: "No key, or not a valid one"}).items()
                }
    schemas: Document = {}
    shared: Document = _with_shared_schemas(document, schemas)
    shared["components"]["schemas"] |= schemas
    return shared


def _with_shared_schemas(node: Any, schemas: Document) -> Any:
    """Returns a part of the document with its `$defs` moved to `schemas`, where references in a document can point.

    Pydantic writes `#/$defs/…` into the schema of a body that a route reads for itself.
    """
    if isinstance(node, list):
        return [_with_shared_schemas(item, schemas) for item in node]
    if isinstance(node, str):
        return node.replace("#/$defs/", "#/components/schemas/") if node.startswith("#/$defs/") else node
    if not isinstance(node, dict):
        return node
    for name, schema in node.get("$defs", {}).items():
        moved = _with_shared_schemas(schema, schemas)
        if schemas.setdefault(name, moved) != moved:
            raise ValueError(f"two schemas have the name {name}: rename one of the models")
    return {key: _with_shared_schemas(value, schemas) for key, value in node.items() if key != "$defs"}


def operation_id(route: APIRoute) -> str:
    """The name of a route's function; what answers GET and HEAD has two operations."""
    return f"head_{route.name}" if "HEAD" in (route.methods or ()) else route.name


def json_body(model: type[BaseModel], *, required: bool = True) -> Document:
    """The body of a route that reads it under its own limits."""
    content = {"application/json": {"schema": model.model_json_schema()}}
    return {"requestBody": {"required": required, "content": content}}


def refusals(descriptions: Mapping[int, str]) -> dict[int | str, Document]:
    """Responses that are problems, by their status."""
    content = {PROBLEM_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {status: {"description": text, "content": content} for status, text in descriptions.items()}


def request_headers(patterns: Mapping[str, str] = MappingProxyType({}), /, **descriptions: str) -> Document:
    """Optional request headers, some with a pattern; underscores are hyphens."""
    return {
        "parameters": [
            {
                "name": name.replace("_", "-"),
                "in": "header",
                "required": False,
                "description": text,
                "schema": {"type": "string", **({"pattern": patterns[name]} if name in patterns else {})},
            }
            for name, text in descriptions.items()
        ]
    }


def response_headers(**descriptions: str) -> Document:
    """Response headers; underscores are hyphens."""
    return {
        name.replace("_", "-"): {"description": text, "schema": {"type": "string"}}
        for name, text in descriptions.items()
    }
