"""The replicas that serve the catalog."""

from fastapi import APIRouter
from pydantic import BaseModel, Field

from prefix_service.api.middleware.auth import PlatformAdmin
from prefix_service.api.routes.schemas import Moment
from prefix_service.api.state import State, StateOf
from prefix_service.catalog.records import Principal, Replica

router = APIRouter(tags=["replicas"])


class Resident(BaseModel):
    """A replica's memory: its prefixes, their bytes on the device, and the bytes of its renderings in host memory."""

    adapters: int
    device_bytes: int
    host_bytes: int


class ReplicaItem(BaseModel):
    """A replica that serves now. `address` is its `PREFIX_ADVERTISE`, or null; moments are by the catalog's clock."""

    id: str
    address: str | None
    release: str
    started: Moment
    seen: Moment
    revision: str = Field(description="the latest change that all its processes have applied, as `Prefix-Min-Revision`")
    behind: int = Field(description="the changes that the answering process knows and this one had not applied")
    resident: Resident


class ReplicaList(BaseModel):
    """Replicas, the oldest start first."""

    items: list[ReplicaItem]


@router.get("/v1/replicas")
async def list_replicas(caller: PlatformAdmin, state: StateOf) -> ReplicaList:
    """Return who serves this catalog now. A replica that has given no sign of life for 15 seconds is left out. A
    service on a data folder is the only one, and has what the answering process has."""
    return ReplicaList(items=[_item(state, caller, found) for found in await state.fleet.listed()])


def _item(state: State, caller: Principal, replica: Replica) -> ReplicaItem:
    serving = replica.serving
    return ReplicaItem(
        id=replica.id,
        address=serving.address,
        release=serving.release,
        started=replica.started,
        seen=replica.seen,
        revision=state.revisions.text(caller, serving.revision),
        behind=max(state.following.revision - serving.revision, 0),
        resident=Resident(adapters=serving.adapters, device_bytes=serving.device_bytes, host_bytes=serving.host_bytes),
    )
