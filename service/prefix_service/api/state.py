"""The collaborators that the composition root passes to the routes."""

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from prefix_service.api.http.opaque import OpaqueNumbers, Revisions
from prefix_service.api.metrics.inference_statistics import InferenceStatistics
from prefix_service.api.metrics.live import Live
from prefix_service.api.metrics.metrics import Metrics
from prefix_service.api.middleware.answers import Answers
from prefix_service.api.middleware.auth import Authenticator
from prefix_service.api.middleware.rates import RateLimits
from prefix_service.api.middleware.usage_counts import UsageCounts
from prefix_service.data_folder.readiness import Readiness
from prefix_service.library.adapters import Adapters
from prefix_service.library.fleet import Fleet
from prefix_service.library.following import Following
from prefix_service.library.known_keys import KnownKeys
from prefix_service.library.library import Library
from prefix_service.library.page_sessions import PageSessions
from prefix_service.library.pages import Pages
from prefix_service.library.publishing import Publisher
from prefix_service.library.residency import Residency
from prefix_service.library.statistics import VersionStatistics
from prefix_service.library.tenancy import Tenancy
from prefix_service.library.timeline import Timelines
from prefix_service.library.watching import Watchers
from prefix_service.registry.admission import Admission
from prefix_service.settings import Settings


@dataclass(slots=True)
class State:
    """The collaborators of one running app."""

    settings: Settings
    library: Library
    residency: Residency
    publisher: Publisher
    adapters: Adapters
    tenancy: Tenancy
    pages: Pages
    following: Following
    admission: Admission
    known_keys: KnownKeys
    page_sessions: PageSessions
    audit_ids: OpaqueNumbers
    authenticator: Authenticator
    rates: RateLimits
    metrics: Metrics
    live: Live
    answers: Answers
    version_statistics: VersionStatistics
    timelines: Timelines
    inference_statistics: InferenceStatistics
    usage_counts: UsageCounts
    readiness: Readiness
    fleet: Fleet
    revisions: Revisions
    watchers: Watchers


def state_of(request: Request) -> State:
    """Returns the collaborators of the app that received this request."""
    state: State = request.app.state.prefix_service
    return state


# FastAPI calls a dependency that is no coroutine in a thread.


async def _state(request: Request) -> State:
    return state_of(request)


async def _library(request: Request) -> Library:
    return state_of(request).library


StateOf = Annotated[State, Depends(_state)]
LibraryOf = Annotated[Library, Depends(_library)]
