"""Live and ready: two different questions."""

from anyio import to_thread
from fastapi import APIRouter

from service.api.schemas import Health
from service.api.state import StateOf

router = APIRouter(tags=["health"])


@router.get("/livez")
async def live() -> Health:
    """The process answers: restart it if this fails."""
    return Health()


@router.get("/readyz")
async def ready(state: StateOf) -> Health:
    """The service can do its work: send it no requests while this fails."""
    await to_thread.run_sync(state.library.catalog.check)
    return Health()
