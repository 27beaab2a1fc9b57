"""Traces of OpenTelemetry: a span for each request, below the caller's, and the export of all spans of the process."""

import contextlib
import logging
import os
from collections.abc import Awaitable, Iterator
from importlib.metadata import version
from typing import Any, Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from prefix_service.api.http.paths import HEALTH
from prefix_service.api.http.served import SERVED, Served

log = logging.getLogger("prefix_service")

_ENDPOINTS: Final = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_CONTEXT: Final = (b"traceparent", b"tracestate")
_UNTRACED: Final = HEALTH | {"/metrics"}


@contextlib.contextmanager
def exported() -> Iterator[bool]:
    """Exports the spans of this process while the block runs, by OTLP over HTTP, if the environment names a collector:
    `OTEL_EXPORTER_OTLP_ENDPOINT`, and what else OpenTelemetry's SDK reads. Yields whether it does.
    """
    if not any(map(os.environ.get, _ENDPOINTS)) or os.environ.get("OTEL_TRACES_EXPORTER", "otlp") != "otlp":
        yield False
        return
    try:
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError:
        # A platform may set the variable for everything that it runs.
        log.warning("%s is set, and nothing is traced: pip install 'prefix-service[traces]'", " or ".join(_ENDPOINTS))
        yield False
        return
    about = {"service.name": os.environ.get("OTEL_SERVICE_NAME", "prefix-service")}
    provider = TracerProvider(resource=Resource.create(about | {"service.version": version("prefix-service")}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    try:
        yield True
    finally:
        provider.shutdown()


class TraceMiddleware:
    """A span for each request but those of probes and scrapes, below the one that `traceparent` names (W3C Trace
    Context), and one for the time in which its answer is sent.

    Of what a caller sends, a span has what the log has: the route's template instead of the path, and the names of a
    version if the answer is made of it.
    """

    def __init__(self, app: ASGIApp) -> None:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._app, self._trace = app, trace
        self._tracer = trace.get_tracer("prefix_service")
        self._propagator = TraceContextTextMapPropagator()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on."""
        if scope["path"] in _UNTRACED:
            await self._app(scope, receive, send)
            return
        context = {name.decode(): value.decode("latin-1") for name, value in scope["headers"] if name in _CONTEXT}
        with self._tracer.start_as_current_span(
            "request", self._propagator.extract(context), self._trace.SpanKind.SERVER
        ) as span:
            answer = _Answer(self._tracer, send)
            try:
                await self._app(scope, receive, answer)
            finally:
                answer.end()
                for name, value in _attributes(scope, answer.status, answer.request_id).items():
                    span.set_attribute(name, value)
                route = getattr(scope.get("route"), "path", None)
                span.update_name(f"{scope['method']} {route}" if route else scope["method"])
                if answer.status >= 500 or not answer.status:
                    span.set_status(self._trace.StatusCode.ERROR)


class _Answer:
    """An answer as it passes: its status (0 until it began), its request's id, and a span from its head to its end."""

    def __init__(self, tracer: Any, send: Send) -> None:
        self.status, self.request_id = 0, ""
        self._tracer, self._send, self._span = tracer, send, None

    def __call__(self, message: Message) -> Awaitable[None]:
        """Notes a message, and passes it on."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.request_id = next(value.decode() for name, value in message["headers"] if name == b"x-request-id")
            self._span = self._tracer.start_span("send the answer")
        return self._send(message)

    def end(self) -> None:
        """Ends the span, if there is one."""
        if self._span is not None:
            self._span.end()


def _attributes(scope: Scope, status: int, request_id: str) -> dict[str, str | int]:
    found: dict[str, str | int] = {"http.request.method": scope["method"], "prefix.request_id": request_id}
    if status:
        found["http.response.status_code"] = status
    if (route := getattr(scope.get("route"), "path", None)) is not None:
        found["http.route"] = route
    if (tenant := scope.get("tenant")) is not None:
        found["prefix.tenant"] = tenant
    parts: tuple[Served, ...] = scope.get(SERVED, ())
    if len(parts) == 1:
        found |= {"prefix.adapter": parts[0].adapter, "prefix.version": parts[0].version}
    if (code := scope.get("problem")) is not None:
        found["error.type"] = code
    return found
