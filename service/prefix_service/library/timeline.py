"""The timeline of a version: what the audit and the usage know of it, in order."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final, Literal, TypeVar

from prefix_service.catalog.audit import AuditLog
from prefix_service.catalog.records import AuditEntry, Version, VersionName
from prefix_service.catalog.usage import UsageStore
from prefix_service.registry.admission import Admission

T = TypeVar("T")

EventKind = Literal[
    "published", "encoded", "loaded", "unloaded", "alias-moved-here", "alias-moved-away", "first-read", "last-read"
]

_MOST: Final = 500  # changes of a version that are shown, the latest
_HOUR: Final = timedelta(hours=1)
_OF_VERSION: Final[dict[str, EventKind]] = {
    "version.published": "published",
    "version.encoded": "encoded",
    "residency.loaded": "loaded",
    "residency.unloaded": "unloaded",
}


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a version. A read is known by its hour, and `at` is the beginning of it; `alias` is
    the alias that began or ceased to name the version; `change` is the entry of the audit, if there is one."""

    at: datetime
    kind: EventKind
    alias: str | None = None
    change: AuditEntry | None = None


class Timelines:
    """Reads timelines in threads, in the turn of the tenant that owns the version."""

    def __init__(self, audit: AuditLog, usage: UsageStore, admission: Admission) -> None:
        self._audit, self._usage, self._admission = audit, usage, admission

    async def of(self, version: Version, write: Callable[[list[Event]], T]) -> T:
        """Returns what `write` makes, in a thread, of what happened to a version, oldest first: its latest 500 changes,
        and its first and last read of the last 90 days. Reads come behind the changes of their hour.

        Raises:
            StorageFailed: the catalog refuses.
        """
        name = VersionName(version.tenant, version.adapter, version.number, version.digest)

        def read() -> T:
            changes = [*_changes(name, reversed(self._audit.of_version(name, _MOST)))]
            if not any(event.kind == "published" for event in changes):
                changes.insert(0, Event(version.created, "published"))
            if (hours := self._usage.read_hours(name)) is not None:
                first, last = hours
                changes += [Event(first, "first-read"), Event(last, "last-read")]
            return write(sorted(changes, key=_order))

        return await self._admission.run(version.tenant, read)


def _order(event: Event) -> datetime:
    return event.at + _HOUR if event.kind in ("first-read", "last-read") else event.at


def _changes(version: VersionName, entries: Iterator[AuditEntry]) -> Iterator[Event]:
    """Yields the events of entries of the audit that concern a version."""
    for entry in entries:
        if entry.target == str(version):
            if (kind := _OF_VERSION.get(entry.action)) is not None:
                yield Event(entry.at, kind, change=entry)
        else:
            kind = "alias-moved-here" if entry.details.get("version") == version.number else "alias-moved-away"
            yield Event(entry.at, kind, entry.target.rpartition("@")[2], entry)
