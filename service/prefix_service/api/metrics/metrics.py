"""The service's numbers for Prometheus; labels are bounded: no caller chooses one."""

import asyncio
import contextlib
import platform
from collections.abc import AsyncIterator, Callable
from importlib.metadata import version
from typing import Final, Literal

import torch
from anyio import to_thread
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import choose_encoder

from prefix_service.api.metrics.worker_metrics import Place, whole_service
from prefix_service.registry.admission import AdmissionReport, Refusal
from prefix_service.registry.report import TierReport

_NAMESPACE: Final = "prefix_service"
_BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)  # seconds
_SAMPLING_SECONDS: Final = 1.0


class Metrics:
    """The metrics of one process. With a `place` among several workers, `exposed` holds the numbers of all of them.

    The tiers of the registry count for themselves; they are sampled, so that no request pays for it.
    """

    def __init__(self, place: Place | None = None) -> None:
        registry = CollectorRegistry()
        self.exposed = registry if place is None else whole_service(place.folder)
        self.in_flight = 0
        self.place = place
        self._requests = _Requests(registry)
        self._tiers = _Tiers(registry)
        self._work = _Work(registry)
        self._read: Callable[[], list[TierReport]] = list
        self._admission: Callable[[], AdmissionReport] | None = None
        self._in_flight = _gauge(registry, "requests_in_flight", "requests that are being answered", ())
        build = _gauge(registry, "build_info", "versions; the value is 1", ("version", "python", "torch"), "livemax")
        build.labels(version("prefix-service"), platform.python_version(), torch.__version__).set(1)

    def watch(self, tiers: Callable[[], list[TierReport]], admission: Callable[[], AdmissionReport]) -> None:
        """Sample these from now on; they are called on the event loop."""
        self._read, self._admission = tiers, admission

    def count(self, route: str, method: str, status: int, seconds: float, sent: int) -> None:
        """A request has ended."""
        self._requests.count(route, method, status, seconds, sent)

    def sample(self) -> None:
        """Take over what is counted elsewhere, as it is now."""
        self._in_flight.set(self.in_flight)
        for report in self._read():
            self._tiers.take(report)
        if self._admission is not None:
            self._work.take(self._admission())

    @contextlib.asynccontextmanager
    async def sampled(self) -> AsyncIterator[None]:
        """Sample every second while the block runs: for scrapes that other processes and the metrics port answer."""
        sampling = asyncio.create_task(self._keep_sampling())
        try:
            yield
        finally:
            sampling.cancel()
            if self.place is not None:
                self.place.leave()

    async def _keep_sampling(self) -> None:
        while True:
            self.sample()
            await asyncio.sleep(_SAMPLING_SECONDS)

    async def exposition(self, accept: str) -> tuple[bytes, str]:
        """The exposed numbers in the format that `accept` (a header's value) asks for, and its media type."""
        self.sample()
        try:
            encoder, media_type = choose_encoder(accept)
        except TypeError:  # a version that is not made of numbers
            encoder, media_type = choose_encoder("")
        return await to_thread.run_sync(encoder, self.exposed), media_type


class _Requests:
    """Counters of requests; the children of a combination of labels are looked up once."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._total = _counter(registry, "requests", "requests that have ended", ("route", "method", "status"))
        self._seconds = Histogram(
            "request_seconds",
            "seconds from a request's head to the last byte of its answer",
            ("route", "outcome"),
            namespace=_NAMESPACE,
            registry=registry,
            buckets=_BUCKETS,
        )
        self._sent = _counter(registry, "sent_bytes", "bytes of answers' bodies", ("route",))
        self._refused = _counter(registry, "refused_keys", "requests without a valid key", ())
        self._limited = _counter(registry, "rate_limited_requests", "requests above their tenant's rate", ())
        self._children: dict[tuple[str, str, int], tuple[Counter, Histogram, Counter]] = {}

    def count(self, route: str, method: str, status: int, seconds: float, sent: int) -> None:
        children = self._children.get((route, method, status)) or self._make(route, method, status)
        total, histogram, bytes_sent = children
        total.inc()
        histogram.observe(seconds)
        if sent:
            bytes_sent.inc(sent)
        if status == 401:
            self._refused.inc()
        elif status == 429:
            self._limited.inc()

    def _make(self, route: str, method: str, status: int) -> tuple[Counter, Histogram, Counter]:
        children = (
            self._total.labels(route, method, status),
            self._seconds.labels(route, f"{status // 100}xx" if status else "aborted"),
            self._sent.labels(route),
        )
        self._children[route, method, status] = children
        return children


class _Tiers:
    """The numbers of a registry's tiers; its counts since the start become increments."""

    def __init__(self, registry: CollectorRegistry) -> None:
        tier = ("tier", "place")
        self._budget = _gauge(registry, "residency_budget_bytes", "bytes that a tier may hold", tier)
        self._used = _gauge(registry, "residency_used_bytes", "bytes that a tier holds", tier)
        self._pinned = _gauge(registry, "residency_pinned_bytes", "bytes that are pinned", tier)
        self._entries = _gauge(registry, "residency_entries", "prefixes or renderings in a tier", tier)
        self._loading = _gauge(registry, "residency_loading", "loads under way", tier)
        self._readers = _gauge(registry, "residency_readers", "leases of this moment", tier)
        self._lookups = _counter(registry, "lookups", "lookups: hit, miss (began a load), wait", (*tier, "result"))
        self._loads = _counter(registry, "loads", "loads that have ended", (*tier, "outcome"))
        self._seconds = _counter(registry, "load_seconds", "seconds spent in loads", tier)
        self._evictions = _counter(registry, "evictions", "entries that left for others", tier)
        self._counted: dict[tuple[Counter, tuple[str, ...]], float] = {}

    def take(self, report: TierReport) -> None:
        """One report."""
        tier = report.name, report.place
        self._budget.labels(*tier).set(report.budget)
        self._used.labels(*tier).set(report.used)
        self._pinned.labels(*tier).set(report.pinned)
        self._entries.labels(*tier).set(report.entries)
        self._loading.labels(*tier).set(report.loading)
        self._readers.labels(*tier).set(report.readers)
        self._raise(self._lookups, (*tier, "hit"), report.hits)
        self._raise(self._lookups, (*tier, "miss"), report.misses)
        self._raise(self._lookups, (*tier, "wait"), report.waits)
        self._raise(self._loads, (*tier, "ok"), report.loads)
        self._raise(self._loads, (*tier, "failed"), report.failures)
        self._raise(self._seconds, tier, report.load_seconds)
        self._raise(self._evictions, tier, report.evictions)

    def _raise(self, counter: Counter, labels: tuple[str, ...], total: float) -> None:
        counter.labels(*labels).inc(total - self._counted.get((counter, labels), 0))
        self._counted[counter, labels] = total


class _Work:
    """The numbers of the admission of requests and work."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._budget = _gauge(registry, "work_budget_bytes", "bytes that work in progress may hold", ())
        self._used = _gauge(registry, "work_used_bytes", "bytes that work in progress holds", ())
        self._waiting = _gauge(registry, "work_waiting_jobs", "jobs that wait for memory", ())
        text = "refusals: too many requests in flight, work of too large a size, no memory for work in time"
        self._refusals = _counter(registry, "refusals", text, ("kind",))
        self._counted: dict[Refusal, int] = {}

    def take(self, report: AdmissionReport) -> None:
        """One report."""
        self._budget.set(report.budget)
        self._used.set(report.used)
        self._waiting.set(report.waiting)
        for kind, total in report.refused.items():
            self._refusals.labels(kind).inc(total - self._counted.get(kind, 0))
            self._counted[kind] = total


def _counter(registry: CollectorRegistry, name: str, text: str, labels: tuple[str, ...]) -> Counter:
    return Counter(name, text, labels, namespace=_NAMESPACE, registry=registry)


def _gauge(
    registry: CollectorRegistry,
    name: str,
    text: str,
    labels: tuple[str, ...],
    workers: Literal["livesum", "livemax"] = "livesum",
) -> Gauge:
    """`workers` says how the gauges of living workers become one."""
    return Gauge(name, text, labels, namespace=_NAMESPACE, registry=registry, multiprocess_mode=workers)
