"""What routes need is found on the event loop: FastAPI calls whatever is no coroutine in a thread of a pool of forty,
which a disk that hangs would fill."""

from collections.abc import Iterator
from dataclasses import is_dataclass
from inspect import isasyncgenfunction, iscoroutinefunction
from pathlib import Path
from typing import get_args, get_type_hints

from fastapi.dependencies.models import Dependant
from fastapi.routing import iter_route_contexts
from pydantic import BaseModel

from prefix_service.api.app import create_app
from prefix_service.api.open_inference.schemas import Statistics
from prefix_service.api.routes.replicas import ReplicaList
from prefix_service.api.routes.residency import AdviceList
from prefix_service.settings import Settings


def _calls(dependant: Dependant) -> Iterator[object]:
    yield dependant.call
    for each in dependant.dependencies:
        yield from _calls(each)


def test_no_dependency_takes_a_thread(tmp_path: Path) -> None:
    """Neither routes nor what they depend on are called in threads."""
    app = create_app(Settings(data_dir=tmp_path))
    dependants = [found for each in iter_route_contexts(app.routes) if (found := getattr(each, "dependant", None))]
    assert len(dependants) > 40
    calls = {call for dependant in dependants for call in _calls(dependant) if not _is_model(call)}
    assert [call for call in calls if not iscoroutinefunction(call) and not isasyncgenfunction(call)] == []


def _is_model(call: object) -> bool:
    return isinstance(call, type) and issubclass(call, BaseModel)


def _holds_models(model: type[BaseModel]) -> bool:
    """Whether a model has a list of other models, or of dataclasses, of which there may be many."""
    parts = [part for field in model.model_fields.values() for part in get_args(field.annotation)]
    return any(_is_model(part) or is_dataclass(part) for part in parts)


def test_lists_of_models_are_written_in_threads(tmp_path: Path) -> None:
    """FastAPI writes what a route returns on the event loop. A long answer is a response that was written elsewhere."""
    app = create_app(Settings(data_dir=tmp_path))
    endpoints = {found for each in iter_route_contexts(app.routes) if (found := getattr(each, "endpoint", None))}
    returned = {get_type_hints(endpoint).get("return") for endpoint in endpoints}
    models = {found for found in returned if isinstance(found, type) and issubclass(found, BaseModel)}
    assert len(models) > 10
    # Of one version; and for operators, of up to 200 versions and of each replica.
    short: set[type[BaseModel]] = {Statistics, AdviceList, ReplicaList}
    assert {model for model in models if _holds_models(model)} == short
