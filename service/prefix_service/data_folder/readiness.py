"""Checks whether the service can answer the next request, at most once a second however many callers ask."""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

from anyio import CapacityLimiter, to_thread

from prefix_service.blobs.port import BlobStore
from prefix_service.catalog.catalog import Catalog
from prefix_service.catalog.database import Database
from prefix_service.data_folder.opening import check as check_folder
from prefix_service.errors import PrefixServiceError, StorageFailed, Unavailable
from prefix_service.settings import Settings

log = logging.getLogger("prefix_service")

_REMEMBERED: Final = 1.0  # seconds
DEADLINE: Final = 2.0
"""The most seconds that all checks together may take."""


def checks_of(
    settings: Settings, database: Database, blobs: BlobStore, are_known: Callable[[], bool]
) -> list[Callable[[], object]]:
    """Returns checks of what the next request needs: the catalog, the blob store, and the data folder.

    All replicas lose PostgreSQL together. They stay ready as long as they serve what they remember of the catalog,
    which `are_known` says: a proxy that took all of them away would serve nobody.
    """
    check = Catalog(database).check
    if settings.catalog_url is not None:
        check = partial(_check_unless, are_known, check)
    return [check, blobs.check, partial(check_folder, settings)]


def _check_unless(are_known: Callable[[], bool], check: Callable[[], None]) -> None:
    if not are_known():
        check()


class Readiness:
    """Runs `checks` in one thread, however many callers ask. Used from one event loop.

    A check blocks, and raises PrefixServiceError if it fails.
    """

    def __init__(self, checks: Sequence[Callable[[], object]], deadline: float = DEADLINE) -> None:
        self._checks = checks
        self._deadline = deadline
        self._thread = CapacityLimiter(1)
        self._running: asyncio.Task[None] | None = None
        self._began = 0.0
        self._reason: str | None = None
        self._valid_until = 0.0
        self._is_ending = False

    def end(self) -> None:
        """Refuses from now on: the process ends."""
        self._is_ending = True

    async def require(self) -> None:
        """Returns if all checks pass now, or passed within the last second.

        Raises:
            Unavailable: the process ends.
            StorageFailed: a check fails, or the checks exceed the deadline; the message has the reason.
        """
        if self._is_ending:
            raise Unavailable("the service ends: it finishes the requests in progress", retry_after=5)
        if time.monotonic() >= self._valid_until:
            if self._running is None or self._running.done():
                self._running, self._began = asyncio.create_task(self._run()), time.monotonic()
            left = self._began + self._deadline - time.monotonic()
            await asyncio.wait([self._running], timeout=max(left, 0))
            if self._running.done():
                self._running.result()
            else:
                self._note(f"the disk or the catalog has not answered within {self._deadline:g} seconds")
        if self._reason is not None:
            raise StorageFailed(self._reason)

    async def _run(self) -> None:
        try:
            await to_thread.run_sync(self._check, limiter=self._thread)
        except (PrefixServiceError, OSError, RuntimeError) as error:  # RuntimeError: no thread can be started
            self._note(str(error))
        else:
            self._note(None)

    def _check(self) -> None:
        for check in self._checks:
            check()

    def _note(self, reason: str | None) -> None:
        if (reason is None) != (self._reason is None):
            if reason is None:
                log.info("ready again")
            else:
                log.error("not ready: %s", reason)
        self._reason = reason
        self._valid_until = time.monotonic() + _REMEMBERED
