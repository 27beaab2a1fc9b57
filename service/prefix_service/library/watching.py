"""Callers that wait for changes or live numbers: bounded in number, and woken by the change feed. Those that ask for
the same changes share one look into the catalog."""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial
from typing import Final

from prefix_service.catalog.changes import (
    AdapterChange,
    Change,
    KeyChange,
    SeenChanges,
    TenantChange,
    seen_changes,
)
from prefix_service.catalog.database import Database
from prefix_service.catalog.records import Principal
from prefix_service.catalog.threads import read_catalog
from prefix_service.errors import Overloaded

TOGETHER: Final = 100
"""Changes that a watcher is given at a time: 25 KB as JSON, which each watcher that does not read holds."""

SHARE: Final = 4
"""A tenant may have one in so many of the watchers of a process, and so may the platform."""

_LOOKS_AGAIN: Final = 3600.0
"""Seconds after which a watcher looks though nothing woke it: its revision must not be older than what is kept."""

_View = tuple[int | None, bool, bool, int | None]


class Watchers:
    """The watchers of one process: at most `most`. Belongs to the event loop; `on_changes` wakes them.

    `is_following` returns whether the changes of others arrive here. While they do, a watcher that nothing woke sends
    no query.
    """

    def __init__(self, database: Database, most: int, is_following: Callable[[], bool]) -> None:
        self._database, self._most, self.is_following = database, most, is_following
        self._watching: dict[str | None, set[Watcher]] = {}
        self._total = 0
        self._reads: dict[_View, asyncio.Task[SeenChanges]] = {}
        self._is_ending = False

    @contextlib.contextmanager
    def begin(self, by: Principal, admit: Callable[[], Awaitable[float]]) -> Iterator["Watcher"]:
        """Counts a watcher while the block runs. `admit` checks its key again, and returns the moment of
        `time.monotonic` when the key ends.

        Raises:
            Overloaded: the process, or the caller's tenant, has as many as it may have.
        """
        of_tenant = max(1, self._most // SHARE)
        if len(self._watching.get(by.tenant, ())) >= of_tenant:
            raise Overloaded(f"{_named(by.tenant)} has {of_tenant} watchers here, the most: try again", 10)
        if self._total >= self._most:
            raise Overloaded(f"there are {self._most} watchers here, the most: try again", 10)
        watcher = Watcher(self, by, admit)
        own = self._watching.setdefault(by.tenant, set())
        own.add(watcher)
        self._total += 1
        try:
            yield watcher
        finally:
            self._total -= 1
            own.discard(watcher)
            if not own:
                del self._watching[by.tenant]

    @property
    def is_ending(self) -> bool:
        """Whether the process ends, and watchers are to leave."""
        return self._is_ending

    def end(self) -> None:
        """Wake all watchers: the process ends."""
        self._is_ending = True
        self._wake_all()

    def on_changes(self, changes: Sequence[Change]) -> None:
        """Wake the watchers of the platform, and those of the tenants that the changes belong to."""
        self._reads.clear()  # looks that began before these changes, which a later caller must not share
        for change in changes:
            match change:
                case TenantChange() | KeyChange() | AdapterChange():
                    self._wake(change.tenant)
                case _:
                    self._wake_all()
        self._wake(None)

    def _wake_all(self) -> None:
        for tenant in self._watching:
            self._wake(tenant)

    def _wake(self, tenant: str | None) -> None:
        for watcher in self._watching.get(tenant, ()):
            watcher.wake()

    async def read(self, by: Principal, since: int | None) -> SeenChanges:
        """Returns the changes after a revision that a caller may see; None for the present revision and no changes.
        Callers that ask the same at the same time share one look into the catalog.

        Raises:
            Gone: some of the changes since then are no longer kept.
            StorageFailed: the catalog cannot be read.
        """
        view = by.tenant_id, by.tenant is None, by.has("admin"), since
        task = self._reads.get(view)
        if task is None:
            task = self._reads[view] = asyncio.create_task(read_catalog(self._read, by, since))
            task.add_done_callback(partial(self._end_read, view))
        return await asyncio.shield(task)

    def _end_read(self, view: _View, task: asyncio.Task[SeenChanges]) -> None:
        if self._reads.get(view) is task:
            del self._reads[view]
        if not task.cancelled():
            task.exception()  # it is raised to the callers that are still there, if any

    def _read(self, by: Principal, since: int | None) -> SeenChanges:
        with self._database.reading() as connection:
            return seen_changes(connection, by, since, TOGETHER)


class Watcher:
    """One caller that waits for changes, or for time to pass."""

    def __init__(self, watchers: Watchers, by: Principal, admit: Callable[[], Awaitable[float]]) -> None:
        self._watchers, self._by, self._admit = watchers, by, admit
        self._woken = asyncio.Event()
        self._woken.set()  # nothing is known before the first look
        self._looked_at = 0.0

    def wake(self) -> None:
        """Let the watcher look again."""
        self._woken.set()

    async def next(self, since: int, seconds: float) -> SeenChanges:
        """Returns the changes after a revision that the caller may see: waits for the first of them, but no longer than
        so many seconds, nor when the process ends. `since` is from a look of this watcher, or before its first one.

        Raises:
            Unauthenticated: the key was revoked, or has ended.
            Gone: some of the changes since then are no longer kept.
            StorageFailed: the catalog cannot be read.
        """
        deadline = time.monotonic() + seconds
        seen = SeenChanges(since, [])
        while True:
            ends = await self._admit()
            if self._must_look():
                self._woken.clear()
                self._looked_at = time.monotonic()
                seen = await self._watchers.read(self._by, seen.revision)
            if seen.changes or self._watchers.is_ending or time.monotonic() >= deadline:
                return seen
            await self._sleep(min(deadline, ends))

    def _must_look(self) -> bool:
        is_old = time.monotonic() - self._looked_at >= _LOOKS_AGAIN
        return self._woken.is_set() or is_old or not self._watchers.is_following()

    async def wait(self, seconds: float) -> None:
        """Returns after so many seconds, or when the process ends.

        Raises:
            Unauthenticated: the key was revoked, or has ended.
            StorageFailed: the catalog cannot be read.
        """
        deadline = time.monotonic() + seconds
        while True:
            self._woken.clear()
            ends = await self._admit()
            if self._watchers.is_ending or time.monotonic() >= deadline:
                return
            await self._sleep(min(deadline, ends))

    async def _sleep(self, until: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(until - time.monotonic(), 0)):
                await self._woken.wait()


def _named(tenant: str | None) -> str:
    return "the platform" if tenant is None else f"tenant {tenant!r}"
