"""The change feed: this process follows the catalog, whoever changed it: itself, another process, the command line."""

import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Final

from prefix_service.catalog.changes import Change, EverythingChanged, changes_after, revision_of
from prefix_service.catalog.database import Database
from prefix_service.errors import PrefixServiceError
from prefix_service.system.background import in_background

log = logging.getLogger("prefix_service")

Listener = Callable[[Sequence[Change]], None]
"""Is called with changes in their order, in the thread that found them; it must not block."""

_PAUSE: Final = 0.25  # seconds between two looks
_STALE: Final = 30.0  # seconds that what is known holds while the catalog cannot be read
_LATE: Final = 5.0  # seconds without a look, of which there are one or more a second
_MOST: Final = 10_000  # changes that are read at a time; who missed more forgets everything, which is quicker


def call(listener: Listener, changes: Sequence[Change]) -> None:
    """Call a listener. If it raises, the error is logged, and the caller goes on to the next listener and changes."""
    try:
        listener(changes)
    except Exception:
        log.exception("a listener failed on changes of the catalog", extra={"changes": len(changes)})


class ChangeFeed:
    """Calls each listener with each change once, in the order of revisions. Safe to share between threads.

    Listeners are called with changes of this process before their writer goes on. Those of others are found while the
    block of `followed` runs: on SQLite within `_PAUSE`, on PostgreSQL by its notification, or within a second. If some
    of the changes since the last look are no longer stored, listeners are called with `EverythingChanged` in their
    place.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._lock = threading.Lock()
        self._listeners: list[Listener] = []
        with database.reading() as connection:
            self._revision = revision_of(connection)
        self._read_at = time.monotonic()
        database.after_writes(self._after_write)

    def listen(self, listener: Listener) -> None:
        """Call this listener too, from now on."""
        self._listeners.append(listener)

    @property
    def revision(self) -> int:
        """The revision up to which listeners have been called."""
        return self._revision

    @property
    def are_known(self) -> bool:
        """Whether the catalog was read within the last 30 seconds, so that caches of it can be relied on."""
        return time.monotonic() - self._read_at < _STALE

    @property
    def is_following(self) -> bool:
        """Whether the catalog was read within the last 5 seconds, so that listeners hear of the changes of others."""
        return time.monotonic() - self._read_at < _LATE

    def catch_up(self) -> None:
        """Call the listeners with what has been committed so far.

        Raises:
            StorageFailed: the database refused.
        """
        with self._lock:
            began = time.monotonic()
            with self._database.reading() as connection:
                latest, found = changes_after(connection, self._revision, _MOST + 1)
            if latest != self._revision:
                # Revisions have no gaps. A smaller one: an older copy of the catalog was put in its place.
                is_complete = len(found) == latest - self._revision <= _MOST
                self._apply(latest, [stored.change for stored in found] if is_complete else [EverythingChanged()])
            self._read_at = began

    def _apply(self, revision: int, changes: list[Change]) -> None:
        """Call the listeners with the changes up to a revision; the caller holds the lock."""
        self._revision = revision
        for listener in self._listeners:
            call(listener, changes)

    def _after_write(self, last: int, changes: list[Change]) -> None:
        with self._lock:
            # Mostly nobody else has written since: then the changes are known, and the writer waits for no read, which
            # could come behind the next commit.
            if last - len(changes) == self._revision:
                self._apply(last, changes)
                return
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
                with self._database.glancing() as glances:
                    while not glances.wait(stop, _PAUSE):
                        self._look(glances.may_have_changed)
                        failing = False
            except PrefixServiceError as error:
                if not failing:
                    log.error("changes of the catalog cannot be read: %s", error)  # noqa: TRY400 - its words say it all
                failing = True
                stop.wait(_PAUSE)

    def _look(self, may_have_changed: Callable[[], bool]) -> None:
        """Look once. Mostly nothing has changed: a glance costs the event loop next to nothing."""
        began = time.monotonic()
        if may_have_changed() or self._read_at == -math.inf:
            self.catch_up()
            return
        with self._lock:
            if self._read_at != -math.inf:  # a change of this process that is not known here came in between
                self._read_at = began
