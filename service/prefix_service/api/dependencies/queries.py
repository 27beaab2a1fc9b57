"""Queries: a parameter that a route does not know is refused, where FastAPI ignores it."""

from collections.abc import Iterator
from inspect import isclass

from fastapi import Request
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute
from pydantic import BaseModel

from prefix_service.errors import InvalidRequest


async def require_known_parameters(request: Request) -> None:
    """Refuse a misspelt or unknown query parameter: the answer would be another than the one that was asked for. Health
    routes and the metrics, which probes and proxies ask in their own ways, ignore it.

    Raises:
        InvalidRequest: the route has no such parameter.
    """
    route = request.scope["route"]
    if not request.query_params or not isinstance(route, APIRoute) or not route.path.startswith(("/v1", "/v2")):
        return
    if "/health/" in route.path:
        return
    known = set(_names(route.dependant))
    unknown = next((name for name in request.query_params if name not in known), None)
    if unknown is not None:
        names = ", ".join(sorted(known)) or "none"
        raise InvalidRequest(f"{unknown!r:.80} is no query parameter of this route: it takes {names}")


def _names(dependant: Dependant) -> Iterator[str]:
    for field in dependant.query_params:
        model = field.field_info.annotation
        if isclass(model) and issubclass(model, BaseModel):
            yield from model.model_fields
        else:
            yield field.alias
    for each in dependant.dependencies:
        yield from _names(each)
