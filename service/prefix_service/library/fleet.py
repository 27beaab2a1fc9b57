"""This process among the replicas that serve one catalog."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from typing import Final

from prefix_service.catalog.feed import ChangeFeed
from prefix_service.catalog.records import Replica, Serving
from prefix_service.catalog.replicas import Replicas
from prefix_service.catalog.threads import read_catalog, write_catalog
from prefix_service.errors import PrefixServiceError
from prefix_service.registry.registry import AdapterRegistry

log = logging.getLogger("prefix_service")

_PAUSE: Final = 5.0  # seconds between two signs of life; replicas count as living for three of them
_ALONE: Final = "local"  # the id of a service that is no replica
_LEAVE: Final = 2.0  # seconds that the end may take


class Fleet:
    """Writes signs of life of this process to the catalog, and calls `on_living` with the number of living replicas.

    Without `replicas`, as on a data folder, which has one service, it writes nothing.
    """

    def __init__(
        self,
        replicas: Replicas | None,
        feed: ChangeFeed,
        registry: AdapterRegistry,
        on_living: Callable[[int], object],
        *,
        address: str | None,
        release: str,
    ) -> None:
        self._replicas, self._feed, self._registry, self._on_living = replicas, feed, registry, on_living
        self._address, self._release = address, release
        self._started = datetime.now(UTC).replace(tzinfo=None)

    @property
    def replica(self) -> str:
        """The id of the replica that this process belongs to."""
        return _ALONE if self._replicas is None else self._replicas.replica

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Writes repeatedly while the block runs, and takes this process out of the catalog at its end."""
        if self._replicas is None:
            yield
            return
        beating = asyncio.create_task(self._keep_beating(self._replicas))
        try:
            yield
        finally:
            beating.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await beating
            # The others notice a process that could not leave after 15 seconds.
            with contextlib.suppress(PrefixServiceError, TimeoutError):
                async with asyncio.timeout(_LEAVE):
                    await write_catalog(self._replicas.leave)

    async def listed(self) -> list[Replica]:
        """Returns the replicas that live, this one among them.

        Raises:
            StorageFailed: the catalog cannot be read.
        """
        if self._replicas is not None:
            return await read_catalog(self._replicas.listed)
        now = datetime.now(UTC).replace(tzinfo=None)
        return [Replica(_ALONE, self._started, now, self._serving())]

    async def _keep_beating(self, replicas: Replicas) -> None:
        is_failing = False
        while True:
            try:
                self._on_living(await write_catalog(replicas.beat, self._serving()))
                is_failing = False
            except PrefixServiceError as error:
                if not is_failing:
                    log.warning("this replica cannot write a sign of life: %s", error)
                is_failing = True
            except Exception:  # the next one may succeed
                log.exception("this replica cannot write a sign of life")
            await asyncio.sleep(_PAUSE)

    def _serving(self) -> Serving:
        device, host = self._registry.tiers()
        return Serving(self._address, self._release, self._feed.revision, device.entries, device.used, host.used)
