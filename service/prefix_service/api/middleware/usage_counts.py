"""Counts usage in memory at the end of each request, and writes it to the catalog in the background."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from itertools import islice
from typing import Final

from starlette.types import Scope

from prefix_service.api.http.served import FIRST_BYTE, SERVED, Served, is_loaded
from prefix_service.catalog.changes import Change, TenantDeleted
from prefix_service.catalog.records import OF_PLATFORM, Principal, Use
from prefix_service.errors import PrefixServiceError
from prefix_service.system.turns import in_thread

log = logging.getLogger("prefix_service")

_HOUR: Final = 3600  # seconds
_PAUSE: Final = 10.0  # seconds between two writes
_TOGETHER: Final = 1000  # rows per transaction
_REST: Final = 0.05  # seconds in which others can write between two transactions
MOST_OF_TENANT: Final = 16_384
"""Pairs of a version and a key that are counted separately for a tenant in an hour."""

MOST: Final = 131_072
"""Pairs that are counted separately for all tenants, and rows that wait while the catalog cannot be written."""


_Counted = tuple[str, str, int, str]
"""Tenant, adapter, version, and the id of a key."""


class UsageCounts:
    """The counts since the last write. Used from the event loop alone.

    Memory is bounded: usage beyond `MOST_OF_TENANT` pairs of version and key per tenant and hour, or beyond `MOST`
    pairs of all tenants, is counted for the tenant alone. `add` writes some of them to the catalog, and
    blocks; without it, counts are dropped.
    """

    def __init__(self, add: Callable[[Sequence[Use]], None] | None) -> None:
        self._add = add
        self._hour = _this_hour()
        self._counts: dict[_Counted, Use] = {}
        self._apart: dict[str, set[_Counted]] = {}
        self._apart_in_all = 0
        self._taken: list[dict[_Counted, Use]] = []
        self._unwritten: dict[tuple[datetime, str, str, int, str], Use] = {}

    def count(self, scope: Scope, status: int, sent: int) -> None:
        """Counts a request that has ended, for each version in its answer; `sent` bytes of the body were sent.

        Failed requests, and those that asked for no prefix, are not counted. Prefix tokens count with the first byte of
        a body: not for 304, nor for later ranges of one body. The bytes of an answer with several versions are divided
        in proportion to their tokens.
        """
        parts: tuple[Served, ...] = scope.get(SERVED, ())
        if not parts or not 200 <= status < 400:
            return
        by: Principal = scope["principal"]
        hands_out = sent > 0 and not scope.get(FIRST_BYTE)
        tokens, left = sum(part.prefix_tokens for part in parts), sent
        for part in parts:
            key = part.tenant, part.adapter, part.version, by.key_id
            use = self._counts.get(key) or self._begin(key, by)
            use.requests += 1
            nbytes = left * part.prefix_tokens // tokens
            use.bytes += nbytes
            left, tokens = left - nbytes, tokens - part.prefix_tokens
            use.cold_loads += is_loaded(scope, part)
            if hands_out:
                use.prefix_tokens += part.prefix_tokens

    def _begin(self, key: _Counted, by: Principal) -> Use:
        tenant, adapter, version, key_id = key
        apart = self._apart.setdefault(tenant, set())
        if key not in apart:
            if len(apart) >= MOST_OF_TENANT or self._apart_in_all >= MOST:
                return self._counts.setdefault((tenant, "", 0, ""), Use(self._hour, tenant))
            apart.add(key)
            self._apart_in_all += 1
        named = key_id if by.tenant is not None else f"{OF_PLATFORM}{key_id}"
        use = self._counts[key] = Use(self._hour, tenant, adapter, version, named)
        return use

    def on_changes(self, changes: Sequence[Change]) -> None:
        """Forget what tenants used that were deleted: a namesake did not. What nobody else has is kept where changes
        were missed."""
        gone = {change.tenant for change in changes if isinstance(change, TenantDeleted)}
        if gone:
            self._counts = {key: use for key, use in self._counts.items() if use.tenant not in gone}

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Writes repeatedly while the block runs, and once more at its end."""
        writing = asyncio.create_task(self._keep_writing())
        try:
            yield
        finally:
            writing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await writing
            await self.write()

    async def _keep_writing(self) -> None:
        while True:
            # Wakes at the turn of the hour, which ends the counts of that hour.
            await asyncio.sleep(min(_PAUSE, _HOUR - time.time() % _HOUR + 0.001))
            await self.write()

    async def write(self) -> None:
        """Writes the counts; counts that cannot be written now are kept for the next time."""
        counts, self._counts = self._counts, {}
        if (hour := _this_hour()) != self._hour:
            self._hour, self._apart, self._apart_in_all = hour, {}, 0
        if counts and self._add is not None:
            self._taken.append(counts)
        if self._add is not None and (self._taken or self._unwritten):
            await in_thread(partial(self._drain, self._add))

    def _drain(self, add: Callable[[Sequence[Use]], None]) -> None:
        """Writes the counts in slices; runs in one thread at a time."""
        while self._taken:
            for use in self._taken.pop(0).values():
                self._unwritten.setdefault(use.place, Use(*use.place)).add(use)
        try:
            while some := list(islice(self._unwritten.values(), _TOGETHER)):
                add(some)
                for use in some:
                    del self._unwritten[use.place]
                if self._unwritten:
                    time.sleep(_REST)
        except PrefixServiceError as error:
            self._require_bound()
            log.warning("usage cannot be written now: %s", error)
        except Exception:
            self._require_bound()
            log.exception("usage cannot be written now")

    def _require_bound(self) -> None:
        if len(self._unwritten) > MOST:
            lost = sum(use.requests for use in self._unwritten.values())
            self._unwritten.clear()
            log.error("usage is lost: the catalog could not be written for too long", extra={"requests": lost})


def _this_hour() -> datetime:
    """Returns the beginning of this hour, naive and in UTC."""
    return datetime.now(UTC).replace(minute=0, second=0, microsecond=0, tzinfo=None)
