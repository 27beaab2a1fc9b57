"""Counts and durations of inference requests, as Triton's statistics extension reports them.

Source: https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_statistics.md
"""

import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final

from prefix_service.catalog.changes import Change, TenantDeleted
from prefix_service.catalog.records import Version, VersionName

VERSIONS_PER_TENANT: Final = 1024
"""Versions of one tenant that are counted; one more displaces the version that was asked for least recently."""


@dataclass(slots=True)
class Duration:
    """How many requests took part in something, and their nanoseconds together."""

    count: int = 0
    ns: int = 0

    def add(self, ns: int) -> None:
        """Count one request."""
        self.count += 1
        self.ns += ns


@dataclass(slots=True)
class VersionStatistics:
    """Counts of one version since this process started.

    `inferences` are rows of successful requests, `last_inference` is in milliseconds since 1970.
    """

    inferences: int = 0
    last_inference: int = 0
    success: Duration = field(default_factory=Duration)
    fail: Duration = field(default_factory=Duration)
    compute_input: Duration = field(default_factory=Duration)
    compute_infer: Duration = field(default_factory=Duration)
    compute_output: Duration = field(default_factory=Duration)


class InferenceStatistics:
    """The statistics of every version that inference was asked for in this process. Used on the event loop alone.

    Each tenant has a bound of its own, so no tenant displaces another's counts. A version's number is never used
    again, so counts never pass to another version.
    """

    def __init__(self) -> None:
        self._tenants: dict[str, OrderedDict[tuple[str, int], VersionStatistics]] = {}

    def read(self, version: Version | VersionName) -> VersionStatistics:
        """Returns the counts of a version; all are 0 where there are none."""
        counted = self._tenants.get(version.tenant, OrderedDict[tuple[str, int], VersionStatistics]())
        return counted.get((version.adapter, version.number), VersionStatistics())

    def measure(self, version: Version) -> "Measurement":
        """Returns the measurement of one request, which begins now."""
        counted = self._tenants.setdefault(version.tenant, OrderedDict())
        key = version.adapter, version.number
        statistics = counted.setdefault(key, VersionStatistics())
        counted.move_to_end(key)
        if len(counted) > VERSIONS_PER_TENANT:
            counted.popitem(last=False)
        return Measurement(statistics)

    def on_changes(self, changes: Sequence[Change]) -> None:
        """Forget the tenants that were deleted."""
        for change in changes:
            if isinstance(change, TenantDeleted):
                self._tenants.pop(change.tenant, None)


class Measurement:
    """One inference request, counted once: as failed if its `with` block raises, or as successful by `succeeded`.

    Every step that can fail has a block of its own; what happens after `succeeded`, which is sending, is not counted.
    """

    def __init__(self, statistics: VersionStatistics) -> None:
        self._statistics = statistics
        self._steps = [time.perf_counter_ns()]
        self._is_counted = False

    def __enter__(self) -> "Measurement":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if error is not None and not self._is_counted:
            self._count(self._statistics.fail, time.perf_counter_ns())

    def arrived(self) -> None:
        """The body is there: time begins now, and the network's is left out."""
        self._steps = [time.perf_counter_ns()]

    def step(self) -> None:
        """The input is read, or the tensors are in memory: a part of the work has ended, and the next one begins."""
        self._steps.append(time.perf_counter_ns())

    def succeeded(self, rows: int) -> None:
        """The answer, which has this many rows, is ready to be sent."""
        now = time.perf_counter_ns()
        arrived, read, loaded = self._steps
        self._statistics.inferences += rows
        self._statistics.compute_input.add(read - arrived)
        self._statistics.compute_infer.add(loaded - read)
        self._statistics.compute_output.add(now - loaded)
        self._count(self._statistics.success, now)

    def _count(self, outcome: Duration, now: int) -> None:
        outcome.add(now - self._steps[0])
        self._statistics.last_inference = time.time_ns() // 1_000_000
        self._is_counted = True
