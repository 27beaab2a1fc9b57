"""Lets one fault after another happen to a service that is in use, and records what was seen of each."""

import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final, Generic, Protocol

import httpx

from tests.chaos.faults import Fault, W
from tests.chaos.service import Service, now, own_file_system
from tests.chaos.truth import Adapter, Truth
from tests.chaos.work import BETWEEN, Seen, Work, key_values_of

_UNDISTURBED: Final = 2.0  # seconds of work before each fault
_LONGEST: Final = 90.0  # seconds within which work must go on
_BACK: Final = 3.0  # seconds within which another worker is started


@dataclass(slots=True)
class Row(Generic[W]):
    """The observations of a fault over all repetitions. Times are seconds, the longest of each; None means never."""

    fault: Fault[W]
    times: int = 0
    skipped: str = ""
    truthful: float | None = 0
    goes_on: float | None = 0
    replaced: float | None = 0  # until another process is started, from the moment that one is expected
    start: float = 0  # until that one is ready
    whole: float = 0  # until all of it is ready
    reads_paused: float = 0
    writes_paused: float = 0
    refused: int = 0  # reads of what every replica has in memory
    errors: Counter[str] = field(default_factory=Counter)
    wrong: int = 0
    lost: int = 0

    @property
    def failure(self) -> str:
        """Returns why the service did not survive this fault, or ""."""
        if self.wrong or self.lost:
            return f"{self.fault.name}: {self.wrong} wrong answers, {self.lost} acknowledged changes lost"
        if self.goes_on is None:
            return f"{self.fault.name}: work did not go on within {_LONGEST:g} seconds"
        if self.fault.serves and self.refused:
            return f"{self.fault.name}: {self.refused} reads of what was in memory failed"
        if self.fault.replaces is not None and (self.replaced is None or self.replaced > _BACK):
            return f"{self.fault.name}: the worker was not replaced within {_BACK:g} seconds"
        return ""


class Campaigned(Protocol):
    """What a campaign lets suffer."""

    def start(self) -> None:
        """Starts it."""
        ...

    def stop(self) -> int:
        """Stops it in order; returns an exit status."""
        ...

    def wait_until_ready(self) -> None:
        """Waits until all of it is ready."""
        ...

    def clients(self, timeout: float = ...) -> list[httpx.Client]:
        """Returns an HTTP client for each address."""
        ...


class Campaign(Generic[W]):
    """Something in use that suffers, on a file system of its own where that is allowed."""

    def __init__(self, suffering: Campaigned, truth: Truth, work: W, why_no_mounts: str | None) -> None:
        self._suffering, self.truth, self.work = suffering, truth, work
        self.why_no_mounts = why_no_mounts

    def suffer(self, fault: Fault[W], row: Row[W]) -> None:
        """Lets the fault happen once, and adds what was seen to its row."""
        if reason := self._why_not(fault):
            row.skipped = reason
            return
        time.sleep(_UNDISTURBED)
        before = (len(self.truth.wrong), len(self.truth.lost))
        self.work.seen = seen = Seen()
        with self._observing(fault, row), fault.begin(self.work):
            began = now()
            time.sleep(fault.seconds)
            ended = now()
        mended = now()
        row.goes_on = _longest(row.goes_on, self._goes_on(seen, mended))
        self._suffering.wait_until_ready()
        row.whole = max(row.whole, now() - mended)
        self._observe(row, seen, began, ended)
        self.replay()
        row.errors += seen.errors
        row.wrong += len(self.truth.wrong) - before[0]
        row.lost += len(self.truth.lost) - before[1]
        row.times += 1

    def _why_not(self, fault: Fault[W]) -> str:
        """Returns why a fault cannot happen here, or ""."""
        return f"needs a mount: {self.why_no_mounts}" if fault.needs and self.why_no_mounts is not None else ""

    def _observing(self, fault: Fault[W], row: Row[W]) -> AbstractContextManager[None]:
        """Observes more in the background, from before the fault begins until it is mended."""
        del fault, row
        return nullcontext()

    def _observe(self, row: Row[W], seen: Seen, began: float, ended: float) -> None:
        """Adds more of what was seen of a fault to its row."""

    @staticmethod
    def _goes_on(seen: Seen, mended: float) -> float | None:
        """Returns how long after the fault the first successful read and write were sent."""
        deadline = now() + _LONGEST
        while now() < deadline:
            read = next((sent for sent in list(seen.reads) if sent >= mended), None)
            written = next((sent for sent in list(seen.writes) if sent >= mended), None)
            if read is not None and written is not None:
                return max(read, written) - mended
            time.sleep(0.02)
        return None

    def replay(self) -> None:
        """Compares everything that was acknowledged with the present answers of each address."""
        with self.work.quiet():
            for client in self._suffering.clients(timeout=30):
                with client:
                    self._compare(client)

    def _compare(self, client: httpx.Client) -> None:
        for adapter in self.truth.adapters():
            for version in adapter.versions:
                self._replay_version(client, adapter, version)
            for alias, version in adapter.aliases.items():
                answer = settled(client, f"{adapter.path}@{alias}", partial(_is_version, version))
                if not _is_version(version, answer):
                    self.truth.lost.append(f"{adapter.path}@{alias} is not {version}: {answer.text}")

    def _replay_version(self, client: httpx.Client, adapter: Adapter, version: int) -> None:
        path = f"{adapter.path}@{version}"
        expected = 404 if version in adapter.leaving else 200
        prefix = settled(client, f"{path}/prefix?layout=stacked", partial(has_status, expected))
        if prefix.status_code != expected:
            self.truth.lost.append(f"{path} must answer {expected}: {prefix.status_code} {prefix.text[:200]!r}")
        elif expected == 200:
            self.truth.check_prefix(adapter, version, key_values_of(prefix.content))
            file = settled(client, f"{path}/parameters", partial(has_status, 200))
            if file.status_code == 200:
                self.truth.check_parameters(adapter, version, file.content)
            else:
                self.truth.lost.append(f"{path}/parameters: {file.status_code} {file.text[:200]!r}")

    def run(self, faults: Sequence[Fault[W]], seconds: float, told: Callable[[str], None]) -> list[Row[W]]:
        """Lets all faults happen, again and again until the time is over; calls `told` with the name of each."""
        rows = {fault.name: Row(fault) for fault in faults}
        deadline = time.monotonic() + seconds
        first = True
        while first or time.monotonic() < deadline:
            for fault in faults:
                if first or time.monotonic() < deadline:
                    told(fault.name)
                    self.suffer(fault, rows[fault.name])
            first = False
            if all(row.skipped for row in rows.values()):
                break
        return list(rows.values())

    def summary(self) -> str:
        """Returns a line on what is no row of the table."""
        return f"{self.truth.acknowledged} changes acknowledged"

    def finish(self) -> None:
        """Stops everything in order, starts it again, and compares it with the journal."""
        with self.work.quiet():
            status = self._suffering.stop()
            if status != 0:
                self.truth.lost.append(f"SIGTERM ended the service with status {status}")
            self._suffering.start()
            self._suffering.wait_until_ready()
        self.replay()


class ServiceCampaign(Campaign[Work]):
    """One service with two workers."""

    def __init__(self, service: Service, truth: Truth, work: Work, why_no_mounts: str | None) -> None:
        super().__init__(service, truth, work, why_no_mounts)
        self._service = service

    def _observing(self, fault: Fault[Work], row: Row[Work]) -> AbstractContextManager[None]:
        return nullcontext() if fault.replaces is None else self._observing_workers(fault.replaces, row)

    @contextmanager
    def _observing_workers(self, after: float, row: Row[Work]) -> Iterator[None]:
        """Observes how another worker takes the place of one that a fault hits, so many seconds after it begins."""
        watching = threading.Thread(target=self._watch, args=(self._service.workers(), after, row))
        watching.start()
        try:
            yield
        finally:
            watching.join()

    def _watch(self, before: Sequence[int], after: float, row: Row[Work]) -> None:
        began = now()
        deadline = began + after + _LONGEST
        while not (new := set(self._service.workers()) - set(before)) and now() < deadline:
            time.sleep(0.02)
        started = now()
        row.replaced = _longest(row.replaced, max(0.0, started - began - after) if new else None)
        while new and now() < deadline:
            if (ready := self._service.ready_since(next(iter(new)))) is not None:
                row.start = max(row.start, ready - started)
                return
            time.sleep(0.05)

    def _observe(self, row: Row[Work], seen: Seen, began: float, ended: float) -> None:
        row.truthful = _longest(row.truthful, _truthful(row.fault, seen, began, ended))


@contextmanager
def campaign(between: float = BETWEEN) -> Iterator[ServiceCampaign]:
    """Yields a service in use with two workers, which ends with the block. Each caller waits `between` seconds between
    two requests.
    """
    with tempfile.TemporaryDirectory(prefix="chaos-") as place, own_file_system(Path(place) / "disk") as refused:
        service, truth = Service(Path(place) / "disk" / "data", Path(place) / "serve.log"), Truth()
        try:
            service.start()
            service.wait_until_ready()
            work = Work(service, truth, between)
            with work.running():
                yield ServiceCampaign(service, truth, work, refused)
        finally:
            service.end()


def settled(
    client: httpx.Client, path: str, is_expected: Callable[[httpx.Response], bool], **headers: str
) -> httpx.Response:
    """Returns the expected answer, or the last one after half a minute: a process hears of another's changes within a
    second, and does not repeat a failed load for three.
    """
    deadline = time.monotonic() + 30
    while True:
        try:
            answer = client.get(path, headers=headers)
        except httpx.TransportError:
            if time.monotonic() > deadline:
                raise
        else:
            if is_expected(answer) or time.monotonic() > deadline:
                return answer
        time.sleep(0.25)


def has_status(status: int, answer: httpx.Response) -> bool:
    return answer.status_code == status


def _is_version(version: int, answer: httpx.Response) -> bool:
    return answer.status_code == 200 and answer.json()["version"] == version


def _truthful(fault: Fault[Work], seen: Seen, began: float, ended: float) -> float | None:
    """Returns how long `/readyz` did not answer 503 during the fault; 0 if it may answer 200."""
    if not fault.unready:
        return 0
    during = [sent for sent, said in seen.readiness if began <= sent < ended and said.startswith("503")]
    return during[0] - began if during else None


def _longest(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else max(one, other)
