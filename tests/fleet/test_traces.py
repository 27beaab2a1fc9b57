"""Traces, at a collector that speaks OTLP: from an application's call through a replica to its bucket and catalog."""

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import obstore
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.api.helpers import upload
from tests.blobs.places import objects
from tests.conftest import Server, running_server
from tests.postgresql import PostgreSQL
from tests.processes import eventually
from tests.seaweedfs import SeaweedFS

ROUTE = "GET /v1/tenants/{tenant}/adapters/{ref}/prefix"
CALL = """
import sys
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from prefix_service.client import PrefixClient

provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(OTLPSpanExporter()))
trace.set_tracer_provider(provider)
with trace.get_tracer("application").start_as_current_span("answer a question"), PrefixClient() as client:
    client.get("acme/a")
"""


@dataclass(frozen=True)
class Span:
    """A span as it came."""

    service: str
    name: str
    trace: bytes
    id: bytes
    parent: bytes
    attributes: dict[str, Any] = field(hash=False)
    is_error: bool


@dataclass
class Collector:
    """A collector's address, and the spans that it received."""

    url: str
    spans: list[Span] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        """The variables with which a process exports its spans to the collector, a few times in a second."""
        return {"OTEL_EXPORTER_OTLP_ENDPOINT": self.url, "OTEL_BSP_SCHEDULE_DELAY": "200"}

    def take(self, body: bytes) -> None:
        """Takes over the spans of a request."""
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            about = {one.key: one.value.string_value for one in resource.resource.attributes}
            for scope in resource.scope_spans:
                for span in scope.spans:
                    values = {one.key: one.value.string_value or one.value.int_value for one in span.attributes}
                    failed = span.status.code == span.status.STATUS_CODE_ERROR
                    self.spans.append(
                        Span(
                            about["service.name"],
                            span.name,
                            span.trace_id,
                            span.span_id,
                            span.parent_span_id,
                            values,
                            failed,
                        )
                    )

    def one(self, name: str, parent: Span | None = None) -> Span:
        """Returns the span with a name, below a parent if one is named."""
        (found,) = [span for span in self.spans if span.name == name and parent in (None, self.parent_of(span))]
        return found

    def parent_of(self, child: Span) -> Span | None:
        """Returns the span that another is below."""
        return next((span for span in self.spans if (span.trace, span.id) == (child.trace, child.parent)), None)


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    """Yields a collector that listens."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            found.take(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found = Collector(f"http://127.0.0.1:{server.server_port}")
    Thread(target=server.serve_forever, daemon=True).start()
    yield found
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def replica(
    collector: Collector, postgresql: PostgreSQL, seaweedfs: SeaweedFS, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """Yields a replica that exports its spans, of a fleet where another one has published `acme/a`."""
    folder, database = tmp_path_factory.mktemp("traces"), postgresql.new_database()
    (secret := folder / "secret").write_text(secrets.token_hex(32))
    shared = seaweedfs.environment | {
        "PREFIX_CATALOG_URL": postgresql.url(database),
        "PREFIX_KEY_SECRET_FILE": str(secret),
        "PREFIX_BLOBS_URL": "s3://tests/traces",
    }
    obstore.put(objects(seaweedfs.url), "made", b"the bucket")
    with ExitStack() as stack:
        with running_server(folder / "first", environment=shared) as first:
            assert upload(first.client(), "acme", "a").status_code == 201
        second = stack.enter_context(running_server(folder / "second", environment=shared | collector.environment))
        second.admin_key = first.admin_key
        yield second
    postgresql.drop(database)


def test_a_call_of_an_application_is_one_trace(collector: Collector, replica: Server) -> None:
    """The parts of a cold read are below the replica's request, which is below the application's call."""
    mine = {"PREFIX_URL": replica.url, "PREFIX_API_KEY": replica.admin_key, "OTEL_SERVICE_NAME": "worker"}
    subprocess.run([sys.executable, "-c", CALL], check=True, env=os.environ | collector.environment | mine, timeout=120)
    eventually(lambda: any(span.name == ROUTE for span in collector.spans))
    question = collector.one("answer a question")
    request = collector.one("GET", question)
    answered = collector.one(ROUTE, request)
    assert (question.service, request.service, answered.service) == ("worker", "worker", "prefix-service")
    assert {span.trace for span in collector.spans if span.attributes.get("prefix.adapter") == "a"} == {question.trace}
    assert not answered.is_error
    assert answered.attributes | {"prefix.version": 1} == answered.attributes
    assert answered.attributes["http.response.status_code"] == 200
    assert answered.attributes["prefix.request_id"] == request.attributes["prefix.request_id"]
    load = collector.one("load into device memory", collector.one("load into host memory", answered))
    read = [span for span in collector.spans if span.name == "ask the bucket"]
    assert read
    assert {collector.parent_of(span) for span in read} == {load}
    below = {span.name for span in collector.spans if collector.parent_of(span) == answered}
    assert below == {"read the catalog", "load into host memory", "send the answer"}


def test_what_is_not_found_and_what_fails(collector: Collector, replica: Server) -> None:
    """A refusal has its code; probes, scrapes and background work have no spans, and no span has a key."""
    client = replica.client()
    with httpx.Client(timeout=60) as stranger:
        stranger.get(f"{replica.url}/readyz")
    problem = client.get("/v1/tenants/acme/adapters/missing/prefix", headers={"traceparent": "00-malformed"})
    assert problem.status_code == 404
    eventually(lambda: any(span.attributes.get("error.type") == "not-found" for span in collector.spans))
    refused = next(span for span in collector.spans if span.attributes.get("error.type") == "not-found")
    assert (refused.name, refused.parent, refused.is_error) == (ROUTE, b"", False)
    roots = {span.name for span in collector.spans if not span.parent}
    assert roots == {"answer a question", ROUTE}
    assert replica.admin_key.split("_")[-1] not in json.dumps([span.attributes for span in collector.spans])


def test_without_a_collector_a_service_goes_on(tmp_path: Path) -> None:
    """A collector that is away costs the service nothing but its spans."""
    away = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_EXPORTER_OTLP_TIMEOUT": "1"}
    with running_server(tmp_path / "data", environment=away) as server:
        assert upload(server.client(), "acme", "a").status_code == 201
    assert server.process.wait(60) == 0
