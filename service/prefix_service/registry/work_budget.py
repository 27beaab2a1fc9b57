"""The memory of work in progress, shared by tenants. Pure state."""

from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import Final

from prefix_service.errors import OutOfSpace

_PART: Final = 2  # one job may take half of the budget, so there is always room for another tenant's
_RESERVED: Final = 8  # an eighth of the budget stays free for small jobs
_SMALL: Final = 64  # small jobs take at most a sixty-fourth of the budget


@dataclass(slots=True, eq=False)
class Job:
    """A tenant's work that takes `nbytes` of memory. It may begin once `is_admitted`."""

    tenant: str
    nbytes: int
    is_admitted: bool = False


@dataclass(slots=True)
class _Tenant:
    running: int = 0  # admitted jobs
    held: int = 0  # their bytes
    waiting: deque[Job] = field(default_factory=deque)


class WorkBudget:
    """A byte budget for the work in progress of all tenants. Pure state.

    Dynamic thresholds (Choudhury and Hahne, "Dynamic queue length thresholds for shared-memory packet switches", 1998):
    a tenant may hold as many bytes as remain free afterwards, so n tenants that want everything hold 1/(n + 1) each,
    and the same amount is free for the next. A tenant without running jobs may begin one job of up to half of the
    budget, if that much is free.

    For large jobs, an eighth of the budget does not count as free. However few tenants hold the rest, a small job (at
    most a sixty-fourth) of a tenant without running jobs therefore begins immediately while all small jobs hold less
    than that eighth. Jobs that do not fit wait. When bytes become free, waiting tenants are served in turn, those
    without running jobs first; while such a tenant waits, no other tenant may begin more than it holds, or than a small
    job.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.used = 0
        self._tenants: dict[str, _Tenant] = {}
        self._turns: OrderedDict[str, None] = OrderedDict()  # tenants with waiting jobs, the next one first

    @property
    def waiting(self) -> int:
        """The number of jobs that are not admitted yet."""
        return sum(len(self._tenants[name].waiting) for name in self._turns)

    def held_by(self, tenant: str) -> int:
        """Returns the bytes of a tenant's admitted jobs."""
        found = self._tenants.get(tenant)
        return found.held if found else 0

    def ask(self, tenant: str, nbytes: int) -> Job:
        """Returns a new job, admitted or waiting; end it in either case.

        Raises:
            OutOfSpace: the job would not fit even alone.
        """
        if nbytes > self.budget // _PART:
            raise OutOfSpace(
                f"this takes {nbytes} bytes of memory, and one request may take {self.budget // _PART}: send less, or "
                "raise PREFIX_WORK_BYTES (the limit is half of it)"
            )
        job, owner = Job(tenant, nbytes), self._tenants.setdefault(tenant, _Tenant())
        if not owner.waiting and self._fits(owner, nbytes) and self._may_pass(owner, nbytes):
            self._admit(owner, job)
        else:
            owner.waiting.append(job)
            self._turns.setdefault(tenant)
        return job

    def end(self, job: Job) -> list[Job]:
        """Ends a job, admitted or waiting; returns the jobs that are admitted in its place."""
        owner = self._tenants[job.tenant]
        if job.is_admitted:
            owner.running -= 1
            owner.held -= job.nbytes
            self.used -= job.nbytes
        else:
            owner.waiting.remove(job)
            if not owner.waiting:
                del self._turns[job.tenant]
        admitted = self._admit_waiting()
        if not owner.running and not owner.waiting:
            del self._tenants[job.tenant]
        return admitted

    def _admit_waiting(self) -> list[Job]:
        admitted: list[Job] = []
        while (name := self._next()) is not None:
            owner = self._tenants[name]
            admitted.append(job := owner.waiting.popleft())
            self._admit(owner, job)
            del self._turns[name]
            if owner.waiting:
                self._turns[name] = None
        return admitted

    def _next(self) -> str | None:
        """Returns the tenant whose first waiting job is admitted next; None if no job fits."""
        for wanted in (False, True):
            for name in self._turns:
                owner = self._tenants[name]
                nbytes = owner.waiting[0].nbytes
                if bool(owner.running) is wanted and self._fits(owner, nbytes) and self._may_pass(owner, nbytes):
                    return name
        return None

    def _admit(self, owner: _Tenant, job: Job) -> None:
        owner.running += 1
        owner.held += job.nbytes
        self.used += job.nbytes
        job.is_admitted = True

    def _fits(self, owner: _Tenant, nbytes: int) -> bool:
        reserve = 0 if nbytes <= self.budget // _SMALL else self.budget // _RESERVED
        free = self.budget - self.used - nbytes - reserve
        return free >= (owner.held + nbytes if owner.running else 0)

    def _may_pass(self, owner: _Tenant, nbytes: int) -> bool:
        """Returns whether a job may begin before the jobs of tenants without running jobs.

        A small job may while its tenant holds no more than small jobs do, because large jobs cannot have that memory.
        """
        return not owner.running or owner.held + nbytes <= self.budget // _SMALL or not self._is_starved()

    def _is_starved(self) -> bool:
        """Returns whether a tenant without running jobs waits."""
        return any(not self._tenants[name].running for name in self._turns)
