"""The OpenAPI document, with what FastAPI cannot see in the signatures of routes, and the page that shows it."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.responses import Response
from starlette.routing import Route

from prefix_service.api.http.page_files import PAGE_FILES, PAGE_FOLDER
from prefix_service.api.http.paths import REFERENCE_FILES
from prefix_service.api.http.public_pages import page_route, read_page
from prefix_service.api.middleware.auth import PUBLIC

PROBLEM_TYPE: Final = "application/problem+json"
_SWAGGER_UI: Final = Path(__file__).parents[1] / "swagger_ui"

Document = dict[str, Any]


def pages(app: FastAPI) -> list[Route]:
    """Returns the routes of the public pages: the document, Swagger UI, which shows it, and the files of the page at
    `/ui`."""
    made: dict[str, Callable[[], Response]] = {"/openapi.json": lambda: JSONResponse(app.openapi())}
    for path, (file, media_type) in REFERENCE_FILES.items():
        made[path] = partial(read_page, _SWAGGER_UI / file, media_type)
    for path, (file, media_type) in PAGE_FILES.items():
        made[path] = partial(read_page, PAGE_FOLDER / file, media_type)
    return [page_route(path, make) for path, make in made.items()]


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
