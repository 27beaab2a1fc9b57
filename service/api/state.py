"""What the composition root hands to the routes."""

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from service.api.answers import Answers
from service.api.auth import Authenticator
from service.api.inference_v2_statistics import InferenceStatistics
from service.api.known_keys import KnownKeys
from service.api.metrics import Metrics
from service.api.opaque import OpaqueNumbers
from service.api.rates import RateLimits
from service.catalog.keys import Keyring
from service.library import Library
from service.readiness import Readiness
from service.registry.admission import Admission
from service.settings import Settings


@dataclass(slots=True)
class State:
    """The collaborators of one running app."""

    settings: Settings
    library: Library
    admission: Admission
    keyring: Keyring
    known_keys: KnownKeys
    audit_ids: OpaqueNumbers
    authenticator: Authenticator
    rates: RateLimits
    metrics: Metrics
    answers: Answers
    inference_statistics: InferenceStatistics
    readiness: Readiness


def state_of(request: Request) -> State:
    """Those of the app that a request came to."""
    state: State = request.app.state.prefix_service
    return state


def _library(request: Request) -> Library:
    return state_of(request).library


def _settings(request: Request) -> Settings:
    return state_of(request).settings


StateOf = Annotated[State, Depends(state_of)]
LibraryOf = Annotated[Library, Depends(_library)]
SettingsOf = Annotated[Settings, Depends(_settings)]
