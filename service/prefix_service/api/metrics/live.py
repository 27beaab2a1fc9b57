"""Live numbers of the last hour. Workers share theirs in files, so any worker answers for the whole service."""

import asyncio
import contextlib
import logging
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

import orjson

from prefix_service.api.metrics.live_counts import ALL, Counts, Sample, TierCounts, document, merged
from prefix_service.api.metrics.worker_metrics import Place
from prefix_service.registry.admission import InFlight
from prefix_service.registry.report import TierReport
from prefix_service.system.turns import in_thread

log = logging.getLogger("prefix_service")

SECONDS: Final = 5.0
"""The length of a slot."""

_SLOTS: Final = 720  # an hour
_IN_A_FILE: Final = 12  # slots
_LATE: Final = 1.0  # seconds after its end when all workers have written a slot
_MOST_TENANTS: Final = 200
"""Tenants that are counted apart in a slot: an hour of so many takes 80 MiB, of a thousand 382."""


class Live:
    """Counts requests as they end, and keeps an hour of slots. Belongs to the event loop.

    With a `place` among several workers, the slots are in files beside those of the metrics, a minute in each.
    """

    def __init__(self, place: Place | None, seconds: float = SECONDS) -> None:
        self.seconds = seconds
        self._place = place
        self._late = _LATE if place is not None else 0.0
        self._now: dict[str, Counts] = {}
        self._own: deque[Sample] = deque(maxlen=_SLOTS)
        self._others: dict[tuple[str, int], list[Sample]] = {}
        self._tiers: Callable[[], list[TierReport]] = list
        self._before: dict[tuple[str, str], TierReport] = {}
        self._in_flight = InFlight(0, 0)

    def watch(self, tiers: Callable[[], list[TierReport]], in_flight: InFlight) -> None:
        """Sample these from now on."""
        self._tiers, self._in_flight = tiers, in_flight

    def count(self, tenant: str | None, problem: str | None, seconds: float, sent: int, *, is_cold: bool) -> None:
        """A request has ended."""
        name = tenant or ""
        counts = self._now.get(name)
        if counts is None:
            if len(self._now) >= _MOST_TENANTS:
                name = ""
            counts = self._now.setdefault(name, Counts())
        counts.add(problem, seconds, sent, is_cold=is_cold)

    @contextlib.asynccontextmanager
    async def sampled(self) -> AsyncIterator[None]:
        """End a slot whenever its time is over, while the block runs."""
        sampling = asyncio.create_task(self._keep_sampling())
        try:
            yield
        finally:
            sampling.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await sampling

    async def _keep_sampling(self) -> None:
        slot = int(time.time() / self.seconds)
        while True:
            left = (slot + 1) * self.seconds - time.time()
            await asyncio.sleep(min(max(left, 0.0), self.seconds))
            sample = self._sample(slot)
            self._own.append(sample)
            if self._place is not None:
                try:
                    await in_thread(partial(_write, self._place, sample))
                except OSError as error:
                    log.warning("live numbers cannot be shared with other workers now: %s", error)
            # Never a slot twice: a timer may ring early, and a clock may be put back.
            slot = max(slot + 1, int(time.time() / self.seconds))

    def _sample(self, slot: int) -> Sample:
        tenants, self._now = self._now, {}
        tenants[ALL] = merged(tenants.values())
        tiers = []
        for report in self._tiers():
            key = report.name, report.place
            tiers.append(TierCounts.between(self._before.get(key), report))
            self._before[key] = report
        requests = self._in_flight
        return Sample(slot, tenants, {**requests.by_tenant, ALL: requests.total}, requests.most, tiers)

    def last_slot(self) -> int:
        """Returns the newest slot that every worker has ended."""
        return int((time.time() - self._late) / self.seconds) - 1

    def seconds_until(self, slot: int) -> float:
        """Returns in how many seconds every worker will have ended a slot; 0 or less if they have."""
        return (slot + 1) * self.seconds + self._late - time.time()

    def read(self, tenant: str | None, since: float) -> Callable[[], dict[str, Any]]:
        """Returns what makes the document of one tenant, or of all, of the slots that begin at the moment `since` or
        later, and have ended by now. Blocking."""
        last, own = self.last_slot(), list(self._own)
        first = max(last - _SLOTS + 1, math.ceil(since / self.seconds))

        def make() -> dict[str, Any]:
            samples = [*own, *self._read_others(first)]
            # Before the first slot that anybody has, there is nothing to show.
            known = min((sample.slot for sample in samples if sample.slot >= first), default=last + 1)
            return document(samples, range(known, last + 1), self.seconds, tenant)

        return make

    def _read_others(self, first: int) -> list[Sample]:
        if self._place is None:
            return []
        known, found = self._others, dict[tuple[str, int], list[Sample]]()
        mine = f"live-{self._place.number}-"
        for file in sorted(self._place.folder.glob("live-*.jsonl")):
            number = int(file.stem.rpartition("-")[2])
            if file.name.startswith(mine):
                continue
            with contextlib.suppress(FileNotFoundError):
                key = file.name, file.stat().st_size
                if key in known:  # kept for who asks for all, also if this caller asks for the last slots alone
                    found[key] = known[key]
                elif (number + 1) * _IN_A_FILE > first:
                    found[key] = _read(file)
        self._others = found
        return [sample for samples in found.values() for sample in samples]


def _write(place: Place, sample: Sample) -> None:
    number = sample.slot // _IN_A_FILE
    with (place.folder / f"live-{place.number}-{number}.jsonl").open("ab") as file:
        file.write(orjson.dumps(sample.to_json()) + b"\n")
    for old in place.folder.glob(f"live-{place.number}-*.jsonl"):
        if int(old.stem.rpartition("-")[2]) < number - _SLOTS // _IN_A_FILE:
            old.unlink(missing_ok=True)


def _read(file: Path) -> list[Sample]:
    """Returns the samples of a file; a line that is still being written is left out."""
    whole = file.read_bytes().rpartition(b"\n")[0]
    return [Sample.from_json(orjson.loads(line)) for line in whole.splitlines()]
