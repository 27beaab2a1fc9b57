"""What the answers of a service have said about it: its catalog, and the revisions that later reads must know."""

import re
import threading
import time
from collections.abc import Mapping
from typing import Final

from prefix_service.client.protocol import Request
from prefix_service.errors import InvalidResponse
from prefix_service.system.forks import renew_in_child

_SETTLED: Final = 60.0
"""Seconds after which every process of a service knows a change: one that cannot read the catalog answers from memory
for 30 seconds at most.
"""
_MOST_WRITES: Final = 8  # that overlapped in time
_REVISION: Final = re.compile(r"[!-~]{1,256}")


class ServiceState:
    """The catalog and the revisions of one service, at however many addresses; safe to share between threads.

    Revisions are opaque, so two of them cannot be compared. A write asks for the revisions of the writes before it, so
    its own is later than theirs; those of writes that overlapped are kept beside each other.
    """

    def __init__(self) -> None:
        self.catalog: str | None = None
        """The catalog that answers came from; None if none of them has named one."""
        self.watched: str | None = None
        """The revision up to which a watch has told of changes."""
        self.writes = 0
        """The number of writes that were answered."""
        self._revisions: tuple[tuple[str, float], ...] = ()  # with the moments of their answers
        self._lock = threading.Lock()
        renew_in_child(self)

    def renew(self) -> None:
        """Replaces the lock in a forked child."""
        self._lock = threading.Lock()

    def note_answer(self, address: str, request: Request, headers: Mapping[str, str], began: float) -> None:
        """Notes the catalog in the headers of an answer, and the revision of a write. The request was sent to `address`
        at the time `began` of `time.monotonic`. An older release names neither.

        Raises:
            InvalidResponse: an earlier answer was another catalog's. Its versions may have the same numbers and other
                contents.
        """
        found = headers.get("prefix-catalog")
        if found is not None and found != self.catalog:
            self._note_catalog(address, found)
        if request.method != "GET":
            self._note_write(headers, began)

    def _note_catalog(self, address: str, found: str) -> None:
        if self.catalog is not None:
            raise InvalidResponse(
                f"{address} answers from catalog {found!r:.80}, and before from {self.catalog!r:.80}: services with "
                "data folders of their own stand behind one address, or its folder was replaced; give the services one "
                "catalog (PREFIX_CATALOG_URL) or each a client of its own, or make another client after a replacement"
            )
        self.catalog = found

    def _note_write(self, headers: Mapping[str, str], began: float) -> None:
        revision = headers.get("prefix-revision", "")
        if not _REVISION.fullmatch(revision):
            return
        now = time.monotonic()
        with self._lock:
            overlapping = [known for known in self._revisions if known[1] > began]
            self._revisions = (*overlapping[1 - _MOST_WRITES :], (revision, now))
            self.writes += 1

    @property
    def needed(self) -> tuple[str, ...]:
        """The revisions that a process must know before it answers this client: that of its watch, and those of its
        latest writes until every process knows them."""
        revisions, watched = self._revisions, () if self.watched is None else (self.watched,)
        if not revisions:
            return watched
        if time.monotonic() - revisions[-1][1] > _SETTLED:
            self._revisions = revisions = ()
        return (*watched, *(revision for revision, _ in revisions))
