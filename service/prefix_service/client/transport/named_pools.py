"""One service behind a name: at one address, or at several that are spread over like given ones.

A name of several addresses is that of a headless Kubernetes Service, for instance. It is looked up again now and then,
since replicas come and go.
"""

import asyncio
import threading
import time
from collections.abc import Mapping
from typing import Final

from prefix_service.client.protocol import Request
from prefix_service.client.transport.connection import Connection
from prefix_service.client.transport.dialling import resolved, several
from prefix_service.client.transport.http1 import Head
from prefix_service.client.transport.link import MOST_UNDECLARED, AllocateBody, Observer
from prefix_service.client.transport.pool import Exchanges, Interrupt, Pool
from prefix_service.client.transport.pools import Pools

_FRESH: Final = 30.0  # seconds between two looks
_PATIENCE: Final = 5.0  # seconds of a look


class NamedPools:
    """Exchanges with the service behind a name. It can be shared between threads, and with forked children."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._alone, self._several = Pool(connection), Pools({})
        self._way: Exchanges | None = None
        self._fresh_until = 0.0

    @property
    def away(self) -> list[str]:
        """The addresses that did not answer when they were last tried."""
        return self._several.away

    def exchange(
        self,
        request: Request,
        allocate: AllocateBody,
        until: float,
        interrupt: Interrupt,
        *,
        headers: Mapping[str, str] | None = None,
        observe: Observer | None = None,
        most: int = MOST_UNDECLARED,
    ) -> tuple[Head, memoryview]:
        """Sends a request to the one address, or to one of several, as `Pools.exchange` does."""
        way = self._known() or self._look(until)
        return way.exchange(request, allocate, until, interrupt, headers=headers, observe=observe, most=most)

    async def exchange_on_loop(
        self,
        request: Request,
        allocate: AllocateBody,
        until: float,
        *,
        headers: Mapping[str, str] | None = None,
        observe: Observer | None = None,
        most: int = MOST_UNDECLARED,
    ) -> tuple[Head, memoryview]:
        """Sends a GET to the one address, or to one of several, on the running event loop."""
        way = self._known()
        if way is None:
            way = await asyncio.to_thread(self._look, until)
        return await way.exchange_on_loop(request, allocate, until, headers=headers, observe=observe, most=most)

    def _known(self) -> Exchanges | None:
        """Returns the way that was found; starts another look if that was a while ago."""
        if self._way is not None and time.monotonic() >= self._fresh_until:
            self._fresh_until = time.monotonic() + _FRESH
            look = threading.Thread(target=self._look, args=(self._fresh_until,), name="prefix-names", daemon=True)
            look.start()
        return self._way

    def _look(self, until: float) -> Exchanges:
        """Looks the name up before the time `until` of `time.monotonic`; returns the way to its addresses.

        A look that fails changes nothing: the pool to the name reports the failure.
        """
        url, now = self._connection.url, time.monotonic()
        try:
            found = several(resolved(url.raw_host, self._connection.port, min(until, now + _PATIENCE)))
        except OSError:
            return self._way or self._alone
        if found:
            self._several.replace({address: self._connection.at(address) for address in found})
        self._way = self._several if found else self._alone
        self._fresh_until = time.monotonic() + _FRESH
        return self._way

    def any(self, avoided: Pool | None = None) -> Pool:
        """Returns the pool to any address."""
        return (self._known() or self._look(time.monotonic() + _PATIENCE)).any(avoided)

    def close(self) -> None:
        """Closes every connection."""
        self._alone.close()
        self._several.close()
