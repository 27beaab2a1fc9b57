"""Lets one fault after another happen to a fleet that is in use, and records what was seen of each."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import httpx

from tests.chaos.campaign import Campaign, Row
from tests.chaos.faults import Fault
from tests.chaos.fleet.fleet import Fleet, fleet
from tests.chaos.fleet.work import BETWEEN, FleetWork
from tests.chaos.service import now
from tests.chaos.truth import Truth
from tests.chaos.work import Seen


class FleetCampaign(Campaign[FleetWork]):
    """Three replicas behind a proxy."""

    def __init__(self, suffering: Fleet, truth: Truth, work: FleetWork, why_no_mounts: str | None) -> None:
        super().__init__(suffering, truth, work, why_no_mounts)
        self._fleet = suffering

    def _why_not(self, fault: Fault[FleetWork]) -> str:
        if fault.name.startswith("clocks") and self._fleet.why_no_clocks is not None:
            return self._fleet.why_no_clocks
        return super()._why_not(fault)

    def _observe(self, row: Row[FleetWork], seen: Seen, began: float, ended: float) -> None:
        # Requests that were sent before the fault ended are part of it, however late they fail.
        refusals = [why for sent, why in self.work.refusals if began <= sent <= ended]
        row.refused += len(refusals)
        seen.errors.update(f"in memory: {why}" for why in refusals)
        row.reads_paused = max(row.reads_paused, _longest_pause(seen.reads, began))
        row.writes_paused = max(row.writes_paused, _longest_pause(seen.writes, began))
        for replica in self._fleet.replicas:
            self.work.pin(replica)
        self.work.refusals = []

    def summary(self) -> str:
        """Returns a line on what is no row of the table."""
        return f"{super().summary()}; a revoked key was accepted for {self.work.keys.longest:.2f} s at most"

    def _compare(self, client: httpx.Client) -> None:
        super()._compare(client)
        self.work.compare_keys(client)


def _longest_pause(sent: Sequence[float], began: float) -> float:
    """Returns the longest time from a fault's begin on without a request that would succeed."""
    moments = [began, *sorted(at for at in sent if at > began)]
    return max((later - earlier for earlier, later in pairwise(moments)), default=now() - began)


@contextmanager
def campaign(tenants: int = 4, between: float = BETWEEN) -> Iterator[FleetCampaign]:
    """Yields a fleet in use, which ends with the block. Each tenant has an owner who changes its adapters; each caller
    waits for so many seconds between two requests.
    """
    with fleet() as (running, refused):
        truth = Truth(tenants=tenants, adapters=2)
        work = FleetWork(running, truth, between)
        work.prepare()
        with work.running():
            yield FleetCampaign(running, truth, work, refused)
