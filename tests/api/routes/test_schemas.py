"""Every model bounds what callers send: lists, objects, texts, numbers, and the errors that are collected."""

from collections.abc import Iterator
from typing import Any

import pytest

from prefix_service.api.app import create_app
from prefix_service.library.request_model import RequestModel
from prefix_service.settings import Settings

APP = create_app(Settings())
BOUNDS = {"list": "max_length", "dict": "max_length", "str": "max_length", "int": ("lt", "le")}


def models(base: type[RequestModel] = RequestModel) -> list[type[RequestModel]]:
    """Returns all models; the app has imported its routes."""
    return [found for own in base.__subclasses__() for found in (own, *models(own))]


def schemas(node: Any) -> Iterator[dict[str, Any]]:
    """Yields every object inside of a schema."""
    if isinstance(node, dict):
        yield node
        for child in node.values():
            yield from schemas(child)
    elif isinstance(node, list | tuple):
        for child in node:
            yield from schemas(child)


def is_bounded(schema: dict[str, Any]) -> bool:
    """Returns whether a schema of pydantic's core has the bound that its type needs."""
    needed = BOUNDS.get(schema.get("type", ""), ())
    names = (needed,) if isinstance(needed, str) else needed
    return not names or any(name in schema for name in names)


def test_there_are_models() -> None:
    assert len(models()) >= 15


@pytest.mark.parametrize("model", models(), ids=lambda model: model.__name__)
def test_every_field_has_a_bound(model: type[RequestModel]) -> None:
    """Lists, objects and texts have a largest size, numbers a largest value, and lists stop at the first error."""
    found = list(schemas(model.__pydantic_core_schema__))
    assert not [schema for schema in found if not is_bounded(schema)]
    assert all(schema.get("fail_fast") for schema in found if schema.get("type") == "list")


def test_every_body_is_one_of_these_models() -> None:
    """No route takes JSON for which the document shows an unbounded list, text or object."""
    document = APP.openapi()
    seen = 0
    for path, operations in document["paths"].items():
        for operation in operations.values():
            body = operation.get("requestBody", {}).get("content", {}).get("application/json")
            if body is None:
                continue
            seen += 1
            found = list(schemas(resolved(body["schema"], document | {"$defs": definitions(body["schema"])})))
            assert not [schema for schema in found if schema.get("type") == "array" and "maxItems" not in schema], path
            assert not [schema for schema in found if is_open(schema)], path
    assert seen >= 10


def definitions(schema: Any) -> dict[str, Any]:
    """Returns all definitions inside of a schema."""
    return {name: own for found in schemas(schema) for name, own in found.get("$defs", {}).items()}


def is_open(schema: dict[str, Any]) -> bool:
    """Returns whether an object may have any number of members."""
    return (
        schema.get("type") == "object"
        and schema.get("additionalProperties") is not False
        and ("maxProperties" not in schema)
    )


def resolved(schema: Any, document: dict[str, Any]) -> Any:
    """Returns the schema with its references replaced."""
    if isinstance(schema, list):
        return [resolved(item, document) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if (reference := schema.get("$ref")) is not None:
        node: Any = document
        for name in reference.removeprefix("#/").split("/"):
            node = node[name]
        return resolved(node, document)
    return {name: resolved(value, document) for name, value in schema.items() if name != "$defs"}


def test_one_unknown_field_is_enough() -> None:
    """One error is collected for any number of unknown fields."""
    from prefix_service.api.http.json_objects import validated
    from prefix_service.api.routes.residency import ResidencyRequest
    from prefix_service.errors import InvalidRequest

    with pytest.raises(InvalidRequest, match="x0: Extra inputs are not permitted"):
        validated(ResidencyRequest, {"pinned": True, **{f"x{number}": number for number in range(100_000)}})


@pytest.mark.parametrize("version", [1, 1.0])
def test_a_whole_number_is_an_integer(version: float) -> None:
    """A whole number is an integer however it is written, as in JSON Schema."""
    from prefix_service.api.http.json_objects import validated
    from prefix_service.api.routes.aliases import AliasTarget

    assert validated(AliasTarget, {"version": version}).version == 1


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        *(("batch_size", wrong) for wrong in ("1", True, 1.5, float("inf"))),
        *(("expand", wrong) for wrong in ("true", 1, 1.0)),
        *(("layers", wrong) for wrong in (1, True)),
    ],
)
def test_json_has_types(name: str, wrong: Any) -> None:
    """In a body, text and booleans are no numbers, and numbers no booleans, other than in a query."""
    from prefix_service.api.http.json_objects import validated
    from prefix_service.errors import InvalidRequest
    from prefix_service.library.plan import PrefixBody

    with pytest.raises(InvalidRequest, match=name):
        validated(PrefixBody, {name: wrong})
