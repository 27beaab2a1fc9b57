"""The composition root: from settings to a running app."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Sequence
from importlib.metadata import version
from typing import Any

from fastapi import Depends, FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

from prefix_service.api.dependencies.queries import require_known_parameters
from prefix_service.api.http import problems
from prefix_service.api.http.negotiation import require_json_acceptable
from prefix_service.api.http.opaque import OpaqueNumbers, Revisions
from prefix_service.api.metrics.inference_statistics import InferenceStatistics
from prefix_service.api.metrics.live import Live
from prefix_service.api.metrics.metrics import Metrics
from prefix_service.api.middleware.answers import Answers
from prefix_service.api.middleware.auth import AuthenticationMiddleware, Authenticator
from prefix_service.api.middleware.charging import ChargingMiddleware
from prefix_service.api.middleware.in_flight import InFlightMiddleware
from prefix_service.api.middleware.rates import RateLimits
from prefix_service.api.middleware.request_log import RequestMiddleware
from prefix_service.api.middleware.revisions import RevisionMiddleware
from prefix_service.api.middleware.streams import StreamMiddleware
from prefix_service.api.middleware.strict_paths import StrictPathMiddleware
from prefix_service.api.middleware.traces import TraceMiddleware, exported
from prefix_service.api.middleware.usage_counts import UsageCounts
from prefix_service.api.open_inference import extensions as inference_v2_extensions
from prefix_service.api.open_inference import routes as inference_v2
from prefix_service.api.routes import (
    adapters,
    aliases,
    audit,
    changes,
    descriptions,
    front,
    health,
    keys,
    live,
    mixed,
    page_sessions,
    prefixes,
    publishing,
    replicas,
    residency,
    tenants,
    timeline,
    usage,
    version_statistics,
)
from prefix_service.api.routes.documentation import documented, operation_id, pages
from prefix_service.api.routes.schemas import Problem
from prefix_service.api.state import State
from prefix_service.catalog.access import PROMPT
from prefix_service.catalog.changes import Change
from prefix_service.catalog.database import Database
from prefix_service.catalog.feed import ChangeFeed, Listener, call
from prefix_service.catalog.keys import Keyring
from prefix_service.catalog.replicas import Replicas
from prefix_service.catalog.sessions import Sessions
from prefix_service.catalog.usage import UsageStore
from prefix_service.data_folder.opening import blob_store, catalog_place, replica_id
from prefix_service.data_folder.readiness import Readiness, checks_of
from prefix_service.library.fleet import Fleet
from prefix_service.library.known_keys import KnownKeys
from prefix_service.library.page_sessions import PageSessions
from prefix_service.library.plan import Limits
from prefix_service.library.shared_files import SharedFiles
from prefix_service.library.unknown_ids import UnknownIds
from prefix_service.library.watching import Watchers
from prefix_service.library.wiring import compose
from prefix_service.registry.admission import Admission
from prefix_service.registry.registry import AdapterRegistry, choose_device
from prefix_service.settings import Settings
from prefix_service.system.host_memory import trimmed

_DESCRIPTION = (
    "Hosts trained prefix-tuning adapters for many tenants and hands their `past_key_values` and attention masks to "
    "remote inference workers, as safetensors."
)


class App(FastAPI):
    """Runs our own middleware in front of FastAPI, so that a cached answer never enters FastAPI's stack."""

    def open(self, state: State, *, traced: bool = False) -> None:
        """Serve with these collaborators from now on."""
        self.state.prefix_service = state
        behind: ASGIApp = ChargingMiddleware(super().__call__, state.answers, state.rates)
        behind = RevisionMiddleware(behind, state.following, state.revisions)
        behind = InFlightMiddleware(behind, state.admission)
        behind = AuthenticationMiddleware(behind, state.authenticator)
        behind = StreamMiddleware(behind)
        front: ASGIApp = RequestMiddleware(
            behind, state.metrics, state.usage_counts, state.live, state.following.catalog_id
        )
        self._front = TraceMiddleware(front) if traced else front

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await (self._front if scope["type"] == "http" else super().__call__)(scope, receive, send)

    def setup(self) -> None:
        """Add the public pages. Each is made once, at its first request; FastAPI makes them for every request."""
        self.router.routes.extend(pages(self))

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            self.openapi_schema = documented(super().openapi())
        return self.openapi_schema


def create_app(settings: Settings, metrics: Metrics | None = None) -> App:
    """The ASGI app of one process; the data folder is opened when its lifespan begins."""
    metrics = metrics or Metrics()

    @contextlib.asynccontextmanager
    async def lifespan(app: App) -> AsyncIterator[None]:
        database = Database(catalog_place(settings), PROMPT, read_only=settings.read_only)
        try:
            with exported() as traced, _shared_files(settings) as shared_files:
                state, feed = _compose(settings, database, metrics, shared_files)
                app.open(state, traced=traced)
                with feed.followed(), state.known_keys.running():
                    async with (
                        metrics.sampled(),
                        state.live.sampled(),
                        state.usage_counts.running(),
                        state.fleet.running(),
                        trimmed(),
                    ):
                        yield
        finally:
            database.close()

    app = App(
        title="prefix-service",
        version=version("prefix-service"),
        description=_DESCRIPTION,
        lifespan=lifespan,
        redirect_slashes=False,
        redoc_url=None,
        generate_unique_id_function=operation_id,
        responses={"default": {"model": Problem, "description": "application/problem+json (RFC 9457)"}},
        dependencies=[Depends(require_known_parameters)],
        # FastAPI's own spans would have paths and queries, and a cached answer would have none: see `TraceMiddleware`.
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    problems.install(app)
    app.include_router(prefixes.router)
    app.include_router(mixed.router)
    app.include_router(descriptions.router)
    app.include_router(version_statistics.router)
    app.include_router(changes.router)
    app.include_router(health.router)
    app.include_router(front.router)
    app.include_router(page_sessions.router)
    app.include_router(live.router)
    app.include_router(inference_v2.router)
    app.include_router(inference_v2_extensions.router)
    for room in (publishing, adapters, aliases, residency, tenants, keys, audit, usage, timeline, replicas):
        app.include_router(room.router, dependencies=[Depends(require_json_acceptable)])
    app.add_middleware(StrictPathMiddleware)
    return app


def begin_end(app: FastAPI) -> None:
    """Say from now on that an app is not ready, and end its answers that wait for changes: the process ends once the
    requests in progress are finished."""
    app.state.prefix_service.readiness.end()
    app.state.prefix_service.watchers.end()


def _on_this_loop(listener: Listener) -> Listener:
    """Schedules the listener before the writing thread's own result, so that a caller always sees the effect of its own
    change."""
    loop = asyncio.get_running_loop()

    def on_changes(changes: Sequence[Change]) -> None:
        loop.call_soon_threadsafe(call, listener, changes)

    return on_changes


def _shared_files(settings: Settings) -> contextlib.AbstractContextManager[SharedFiles | None]:
    if settings.shared_dir is None:
        return contextlib.nullcontext()
    return contextlib.closing(SharedFiles(settings.shared_dir))


def _compose(
    settings: Settings, database: Database, metrics: Metrics, shared_files: SharedFiles | None
) -> tuple[State, ChangeFeed]:
    device = choose_device(settings.device)
    registry = AdapterRegistry(device, settings.device_bytes, settings.rendering_bytes)
    limits = Limits(settings.max_batch_size, settings.max_sequence_length, settings.max_upload_bytes)
    admission = _admission(settings)
    metrics.watch(registry.tiers, admission.report)
    numbers = Live(metrics.place)
    numbers.watch(registry.tiers, admission.requests)
    blobs = blob_store(settings)
    keyring = Keyring(database, settings.secret_file)
    cases = compose(database, keyring, blobs, registry, limits, admission, shared_files)
    feed = cases.feed
    unknown_ids = UnknownIds()
    known_keys = KnownKeys(keyring, unknown_ids, lambda: feed.are_known, notes_uses=not settings.read_only)
    page_sessions = PageSessions(Sessions(database), unknown_ids, keyring.derived("page sessions"))
    authenticator = Authenticator(None if settings.dev else known_keys, page_sessions)
    rates = RateLimits(cases.tenancy.requests_per_second, lambda: feed.are_known)
    statistics = InferenceStatistics()
    usage_counts = UsageCounts(None if settings.read_only else UsageStore(database).add)
    readiness = Readiness(checks_of(settings, database, blobs, lambda: feed.are_known))
    fleet = Fleet(
        _replicas(settings, database),
        feed,
        registry,
        rates.divide,
        address=settings.advertise,
        release=version("prefix-service"),
    )
    watchers = Watchers(database, settings.max_watchers, lambda: feed.is_following)
    # Watchers last: when they wake, a revoked key is known to be.
    for listening in (cases.residency, cases.publisher, known_keys, rates, statistics, usage_counts, watchers):
        feed.listen(_on_this_loop(listening.on_changes))
    state = State(
        settings=settings,
        library=cases.library,
        residency=cases.residency,
        publisher=cases.publisher,
        adapters=cases.adapters,
        tenancy=cases.tenancy,
        pages=cases.pages,
        following=cases.following,
        admission=admission,
        known_keys=known_keys,
        page_sessions=page_sessions,
        audit_ids=OpaqueNumbers(keyring.derived("audit ids")),
        authenticator=authenticator,
        rates=rates,
        metrics=metrics,
        live=numbers,
        answers=Answers(cases.library),
        version_statistics=cases.statistics,
        timelines=cases.timelines,
        inference_statistics=statistics,
        usage_counts=usage_counts,
        readiness=readiness,
        fleet=fleet,
        revisions=Revisions(keyring.derived),
        watchers=watchers,
    )
    return state, feed


def _admission(settings: Settings) -> Admission:
    return Admission(
        in_flight=settings.max_in_flight,
        in_flight_tenant=settings.max_in_flight_tenant,
        work_bytes=settings.work_bytes,
        processors=os.cpu_count() or 1,
    )


def _replicas(settings: Settings, database: Database) -> Replicas | None:
    """Returns the catalog's replicas, of which this process is one; None if it is none."""
    if settings.catalog_url is None or settings.read_only:
        return None
    return Replicas(database, replica_id(settings.data_dir))
