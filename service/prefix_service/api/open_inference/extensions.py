"""Triton's extensions `model_configuration` and `statistics`, and a clear word about those that are absent.

Source: https://github.com/triton-inference-server/server/tree/main/docs/protocol
"""

from collections.abc import Callable, Coroutine
from dataclasses import asdict
from functools import partial
from inspect import getdoc
from typing import Any, Final

from fastapi import APIRouter
from starlette.responses import Response, StreamingResponse

from prefix_service.api.http.paths import NamePath, SelectorPath
from prefix_service.api.metrics.inference_statistics import Duration, InferenceStatistics
from prefix_service.api.middleware.auth import Caller, ReadableTenant
from prefix_service.api.open_inference.models import (
    MODEL,
    VERSION,
    every_version,
    inputs_of_every_model,
    json_in_turn,
    json_list,
    name_of,
    outputs_of,
    platform_of,
    resolved,
)
from prefix_service.api.open_inference.schemas import ModelConfig, ModelStatistics, Statistics
from prefix_service.api.state import State, StateOf
from prefix_service.catalog.records import Version, VersionName
from prefix_service.errors import NotFound
from prefix_service.library.library import Library

EXTENSIONS: Final = ("binary_tensor_data", "model_configuration", "model_repository", "parameters", "statistics")
"""The extensions that are there, by the names that Triton gives them."""


def _regions(kind: str) -> tuple[str, ...]:
    of_one = tuple(f"/{kind}/region/{{region}}/{action}" for action in ("status", "register", "unregister"))
    return (f"/{kind}/status", f"/{kind}/unregister", *of_one)


_ABSENT: Final = {
    "trace": ("/trace/setting", f"{MODEL}/trace/setting"),
    "logging": ("/logging",),
    "system_shared_memory": _regions("systemsharedmemory"),
    "cuda_shared_memory": _regions("cudasharedmemory"),
}
"""Extensions of Triton whose routes its clients call, and that are not here."""

router = APIRouter(prefix="/v2", tags=["open inference protocol"])

_LISTING: Final[dict[str, Any]] = {
    "response_class": StreamingResponse,
    "responses": {200: {"description": getdoc(Statistics), "model": Statistics}},
}


@router.get(f"{MODEL}/config", response_model=ModelConfig)
async def model_config(tenant: ReadableTenant, name: NamePath, state: StateOf) -> Response:
    """The configuration of a model's latest version."""
    version = await resolved(state.library, tenant, name)
    return await json_in_turn(state.admission, tenant, partial(_configuration, state.library, version))


@router.get(f"{VERSION}/config", response_model=ModelConfig)
async def version_config(tenant: ReadableTenant, name: NamePath, version: SelectorPath, state: StateOf) -> Response:
    """The configuration of one version."""
    found = await resolved(state.library, tenant, name, version)
    return await json_in_turn(state.admission, tenant, partial(_configuration, state.library, found))


@router.get("/models/stats", **_LISTING)
async def all_statistics(caller: Caller, state: StateOf) -> StreamingResponse:
    """Counts of every version that the caller may see, in the order of names and numbers."""
    return await _counts(state, caller.tenant)


@router.get(f"{MODEL}/stats", **_LISTING)
async def model_statistics(tenant: ReadableTenant, name: NamePath, state: StateOf) -> StreamingResponse:
    """Counts of every version of a model, oldest first."""
    await resolved(state.library, tenant, name)  # 404 where there is no such adapter
    return await _counts(state, tenant, name)


@router.get(f"{VERSION}/stats")
async def version_statistics(
    tenant: ReadableTenant, name: NamePath, version: SelectorPath, state: StateOf
) -> Statistics:
    """Counts of one version."""
    found = await resolved(state.library, tenant, name, version)
    return Statistics(model_stats=[ModelStatistics.model_validate(_counted(state.inference_statistics, found))])


def _configuration(library: Library, version: Version) -> dict[str, Any]:
    """Returns what `ModelConfig` describes."""
    return {
        "name": name_of(version),
        "platform": platform_of(version),
        "backend": "prefix-service",
        "max_batch_size": 0,
        "input": [{**_configured(tensor), "optional": True} for tensor in inputs_of_every_model()],
        "output": [_configured(tensor) for tensor in outputs_of(library, version)],
    }


def _configured(tensor: dict[str, Any]) -> dict[str, Any]:
    """Returns what `ConfiguredTensor` describes."""
    return {"name": tensor["name"], "data_type": f"TYPE_{tensor['datatype']}", "dims": tensor["shape"]}


async def _counts(state: State, tenant: str | None, adapter: str | None = None) -> StreamingResponse:
    counted = partial(_counted, state.inference_statistics)
    pages = every_version(state.pages, tenant, adapter, counted)
    return await json_list(pages, b'{"model_stats":[', b"]}")


def _counted(statistics: InferenceStatistics, version: Version | VersionName) -> dict[str, Any]:
    """Returns what `ModelStatistics` describes."""
    found = statistics.read(version)
    never = asdict(Duration())
    return {
        "name": name_of(version),
        "version": str(version.number),
        "last_inference": found.last_inference,
        "inference_count": found.inferences,
        "execution_count": found.success.count,
        "inference_stats": {
            "success": asdict(found.success),
            "fail": asdict(found.fail),
            "queue": {"count": found.success.count, "ns": 0},
            "compute_input": asdict(found.compute_input),
            "compute_infer": asdict(found.compute_infer),
            "compute_output": asdict(found.compute_output),
            "cache_hit": never,
            "cache_miss": never,
        },
    }


def _refusing(extension: str) -> Callable[[], Coroutine[Any, Any, None]]:
    async def refuse() -> None:
        raise NotFound(f"this server has no extension {extension}: it has {', '.join(EXTENSIONS)}")

    return refuse


for _extension, _paths in _ABSENT.items():
    for _path in _paths:
        router.add_api_route(_path, _refusing(_extension), methods=["GET", "POST"], include_in_schema=False)
