"""Looks at whether the catalog may have changed: cheap ones, many a minute, of one thread."""

import threading
import time
from collections.abc import Callable
from typing import Any, Final, Protocol

import sqlalchemy as sa

from prefix_service.catalog.access import refused
from prefix_service.catalog.changes import CHANNEL, revision_of

_POLL: Final = 1.0  # seconds between two looks into PostgreSQL; a notification leads to an earlier one


class Glances(Protocol):
    """`wait` until it is time to look, then ask whether anything `may_have_changed` since the last look. Both raise
    StorageFailed if the database refuses."""

    def wait(self, stop: threading.Event, pause: float) -> bool: ...
    def may_have_changed(self) -> bool: ...


class FileGlances:
    """Looks every `pause` seconds at SQLite's `data_version`, which another connection's commit changes."""

    def __init__(self, connection: sa.Connection) -> None:
        self._driver: Any = connection.connection.driver_connection
        self._last: int | None = None

    def wait(self, stop: threading.Event, pause: float) -> bool:
        """Returns after `pause` seconds, or when `stop` is set; returns whether it is."""
        return stop.wait(pause)

    def may_have_changed(self) -> bool:
        """Returns whether another connection has committed since the last call, and True at the first."""
        try:
            found: int = self._driver.execute("PRAGMA data_version").fetchone()[0]
        except self._driver.Error as error:
            raise refused(error) from error
        changed, self._last = found != self._last, found
        return changed


class ServerGlances:
    """Looks every second at the revision of a catalog on PostgreSQL, and immediately after a notification.

    Notifications are hints: without them, as on a connection that was cut or through a pooler, every change is found
    all the same. The first look is immediate, so that nothing is missed after a new connection.
    """

    def __init__(self, connection: sa.Connection) -> None:
        from prefix_service.catalog.postgres import received

        self._connection, self._received = connection, received
        self._last: int | None = None
        self._is_notified = False
        connection.exec_driver_sql(f"LISTEN {CHANNEL}")

    def wait(self, stop: threading.Event, pause: float) -> bool:
        """Returns after a second, after a notification, or within `pause` seconds after `stop` is set; returns whether
        it is."""
        until = time.monotonic() + (0 if self._last is None else _POLL)
        while not stop.is_set() and (left := until - time.monotonic()) > 0 and not self._is_notified:
            self._is_notified = self._notified(min(left, pause))
        return stop.is_set()

    def _notified(self, seconds: float) -> bool:
        driver: Any = self._connection.connection.driver_connection
        try:
            return self._received(self._connection, seconds)
        except driver.Error as error:
            raise refused(error) from error

    def may_have_changed(self) -> bool:
        """Returns whether there was a notification, or another revision than at the last call."""
        if self._is_notified:
            self._is_notified = False
            return True
        found = revision_of(self._connection)
        changed, self._last = found != self._last, found
        return changed


def glances_of(connection: sa.Connection) -> Glances:
    """Returns the looks of a connection, which are all that it is used for."""
    make: Callable[[sa.Connection], Glances] = FileGlances if connection.dialect.name == "sqlite" else ServerGlances
    return make(connection)
