"""The collaborators that the composition root passes to the routes."""

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from prefix_service.api.http.opaque import OpaqueNumbers
from prefix_service.api.http.revisions import Revisions
from prefix_service.api.metrics.inference_statistics import InferenceStatistics
from prefix_service.api.metrics.live import Live
from prefix_service.api.metrics.metrics import Metrics
from prefix_service.api.middleware.answers import Answers
from prefix_service.api.middleware.auth import Authenticator
from prefix_service.api.middleware.browser_sessions import BrowserSessions
from prefix_service.api.middleware.known_keys import KnownKeys
from prefix_service.api.middleware.rates import RateLimits
from prefix_service.api.middleware.usage_counts import UsageCounts
from prefix_service.catalog.keys import Keyring
from prefix_service.catalog.usage import UsageStore
from prefix_service.data_folder.readiness import Readiness
from prefix_service.library.library import Library
from prefix_service.library.statistics import VersionStatistics
from prefix_service.library.watching import Watchers
from prefix_service.registry.admission import Admission
from prefix_service.settings import Settings


@dataclass(slots=True)
class State:
    """The collaborators of one running app."""

    settings: Settings
    library: Library
    admission: Admission
    keyring: Keyring
    known_keys: KnownKeys
    browser_sessions: BrowserSessions
    audit_ids: OpaqueNumbers
    authenticator: Authenticator
    rates: RateLimits
    metrics: Metrics
    live: Live
    answers: Answers
    version_statistics: VersionStatistics
    inference_statistics: InferenceStatistics
    usage_counts: UsageCounts
    usage: UsageStore
    readiness: Readiness
    revisions: Revisions
    watchers: Watchers


def state_of(request: Request) -> State:
    """Returns the collaborators of the app that received this request."""
    state: State = request.app.state.prefix_service
    return state


def _library(request: Request) -> Library:
    return state_of(request).library


def _settings(request: Request) -> Settings:
    return state_of(request).settings


StateOf = Annotated[State, Depends(state_of)]
LibraryOf = Annotated[Library, Depends(_library)]
SettingsOf = Annotated[Settings, Depends(_settings)]
