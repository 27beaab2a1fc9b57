"""Routes for operators: liveness, readiness, metrics."""

from typing import Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from prefix_service.api.middleware.auth import MetricsReader
from prefix_service.api.state import StateOf

router = APIRouter()


class Health(BaseModel):
    """Live or ready."""

    status: Literal["ok"] = "ok"


@router.get("/livez", tags=["health"])
async def live() -> Health:
    """The process answers: restart it if this fails."""
    return Health()


@router.get("/readyz", tags=["health"])
async def ready(state: StateOf) -> Health:
    """The next request could be answered: send the service none while this fails."""
    await state.readiness.require()
    return Health()


@router.get(
    "/metrics",
    tags=["metrics"],
    response_class=Response,
    responses={200: {"description": "Prometheus' text, or OpenMetrics", "content": {"text/plain": {}}}},
)
async def metrics(request: Request, _caller: MetricsReader, state: StateOf) -> Response:
    """Return the metrics of all worker processes, whichever answers, for Prometheus."""
    content, media_type = await state.metrics.exposition(request.headers.get("accept", ""))
    return Response(content, headers={"Content-Type": media_type, "Cache-Control": "no-store"})
