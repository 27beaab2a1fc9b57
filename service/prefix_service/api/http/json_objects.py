"""JSON objects in requests: parsed under limits, and validated, with this project's errors."""

from typing import Any, Final, TypeVar

from pydantic import BaseModel, ValidationError

from prefix_service.api.http.problems import invalid_request
from prefix_service.errors import InvalidConfig, InvalidRequest
from prefix_service.prefix.json_text import parse_json

MOST_JSON: Final = 1 << 20
"""Bytes of JSON without masks."""

MOST_MASK_JSON: Final = 4 << 20
"""Bytes of JSON with a mask."""

M = TypeVar("M", bound=BaseModel)


def json_object(body: bytes | bytearray, what: str = "the body") -> dict[str, Any]:
    """Returns the JSON object that a body is, or a part of it, which errors call `what`. Blocking.

    Raises:
        InvalidRequest: it is not one, or it has too many values or names.
    """
    try:
        return parse_json(bytes(body), what, len(body))
    except InvalidConfig as error:
        raise InvalidRequest(str(error)) from error


def validated(model: type[M], values: dict[str, Any]) -> M:
    """Returns a JSON object as its model.

    Raises:
        InvalidRequest: a field is missing, unknown or malformed.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise invalid_request(error.errors(include_url=False)) from error
