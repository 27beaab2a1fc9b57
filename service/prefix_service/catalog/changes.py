"""What changed in the catalog, whoever changed it: this process, another worker, or the command line."""

import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Final

import sqlalchemy as sa

from prefix_service.catalog.audit import ENTRY
from prefix_service.catalog.database import Database
from prefix_service.catalog.records import AuditEntry
from prefix_service.catalog.schema import audit
from prefix_service.errors import PrefixServiceError
from prefix_service.system.background import in_background

log = logging.getLogger("prefix_service")

Listener = Callable[[Sequence[AuditEntry]], None]
"""Hears changes in their order, in the thread that found them; it must not block."""

_PAUSE: Final = 0.25  # seconds between two looks
_STALE: Final = 30.0  # seconds that what is known holds while the catalog cannot be read


def tell(listener: Listener, changes: Sequence[AuditEntry]) -> None:
    """Calls a listener. If it raises, the error is logged, and the caller goes on to the next listener and changes."""
    try:
        listener(changes)
    except Exception:
        log.exception("a listener failed on changes of the catalog", extra={"changes": len(changes)})


class Changes:
    """The audit log, followed: each listener hears of each change once. Safe to share between threads.

    Changes of this process are heard before its writer goes on, those of others within `_PAUSE` while the block of
    `followed` runs. The audit's ids are in the order of commits on SQLite, whose write transactions exclude each other.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._lock = threading.Lock()
        self._listeners: list[Listener] = []
        with database.reading() as connection:
            self._last: int = connection.scalar(sa.select(sa.func.coalesce(sa.func.max(audit.c.id), 0))) or 0
        self._read_at = time.monotonic()
        database.after_writes(self._after_write)

    def listen(self, listener: Listener) -> None:
        """Tell this listener too, from now on."""
        self._listeners.append(listener)

    @property
    def are_known(self) -> bool:
        """Whether the catalog could be read lately: what was remembered of it may be relied on."""
        return time.monotonic() - self._read_at < _STALE

    def catch_up(self) -> None:
        """Hear what has been committed so far.

        Raises:
            StorageFailed: the database refused.
        """
        with self._lock:
            began = time.monotonic()
            with self._database.reading() as connection:
                query = ENTRY.where(audit.c.id > self._last).order_by(audit.c.id)
                entries = [AuditEntry(*row) for row in connection.execute(query)]
            if entries:
                self._last = entries[-1].id
                for listener in self._listeners:
                    tell(listener, entries)
            self._read_at = began

    def _after_write(self) -> None:
        try:
            self.catch_up()
        except PrefixServiceError:
            # The change was made, and is not known here: nothing that is remembered may be relied on.
            self._read_at = -math.inf

    def followed(self) -> contextlib.AbstractContextManager[None]:
        """Look again and again, in a thread, while the block runs."""
        return in_background("changes", self._follow)

    def _follow(self, stop: threading.Event) -> None:
        failing = False
        while not stop.is_set():
            try:
                with self._database.glancing() as may_have_changed:
                    while not stop.wait(_PAUSE):
                        self._look(may_have_changed)
                        failing = False
            except PrefixServiceError as error:
                if not failing:
                    log.error("changes of the catalog cannot be read: %s", error)  # noqa: TRY400 - its words say it all
                failing = True
                stop.wait(_PAUSE)

    def _look(self, may_have_changed: Callable[[], bool]) -> None:
        """Mostly nothing has changed: a glance costs the event loop next to nothing."""
        began = time.monotonic()
        if may_have_changed() or self._read_at == -math.inf:
            self.catch_up()
            return
        with self._lock:
            if self._read_at != -math.inf:  # a change of this process that is not known here came in between
                self._read_at = began
