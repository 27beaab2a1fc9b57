"""A span of OpenTelemetry around each request, in an application that traces, and its context in the request."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from prefix_service.client.protocol import Request


@contextmanager
def traced(request: Request) -> Iterator[Request]:
    """Yields the request to send: where OpenTelemetry's API is loaded, with the header `traceparent` (W3C Trace
    Context) of a span around it. An error that leaves the block is recorded.
    """
    if (trace := sys.modules.get("opentelemetry.trace")) is None:
        yield request
        return
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    about = {"http.request.method": request.method, "url.path": request.path, "prefix.request_id": request.request_id}
    tracer = trace.get_tracer("prefix_service.client")
    with tracer.start_as_current_span(request.method, kind=trace.SpanKind.CLIENT, attributes=about):
        context: dict[str, str] = {}
        TraceContextTextMapPropagator().inject(context)
        yield replace(request, headers={**request.headers, **context}) if context else request
