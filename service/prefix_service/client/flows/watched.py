"""What a watch of the service's changes has told a client: which cached answers are still true without being asked for.

An answer to `tenant/adapter@alias` or `…@latest` is true as long as the watch is heard from, and has told of no change
of the adapter since the request for that answer. Such a request asks for the revision up to which the watch has told
(`Prefix-Min-Revision`): the answer contains every change before it, and the watch tells of every change after it,
whichever replica answered.
"""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, Self

from prefix_service.client.cache.cache import LocalCache, Stamp
from prefix_service.client.flows.question import Question
from prefix_service.client.service_state import ServiceState
from prefix_service.errors import InvalidResponse
from prefix_service.prefix.references import LATEST
from prefix_service.system.bounded import put_last
from prefix_service.system.forks import renew_in_child

SILENCE: Final = 20.0
"""Seconds of silence after which a watch tells nothing any more. The service sends a sign of life every 15 seconds."""

_MOST_CHANGED: Final = 10_000
_FIELDS: Final = ("tenant", "adapter", "alias", "digest")

EVERYTHING: Final = "everything-changed"
"""The kind of change that stands for all that a watch has missed."""


@dataclass(frozen=True, slots=True)
class WatchedChange:
    """One change of the service. Members that its `kind` does not have are None; `everything-changed` has none: changes
    were missed, since the watch was away for longer than the service keeps them."""

    kind: str
    tenant: str | None = None
    adapter: str | None = None
    alias: str | None = None
    version: int | None = None
    digest: str | None = None

    @classmethod
    def of(cls, item: Any) -> Self:
        """Returns the change in an item of `/v1/changes`.

        Raises:
            InvalidResponse: it is none.
        """
        if not isinstance(item, dict) or not isinstance(item.get("kind"), str):
            raise InvalidResponse(f"a change should be an object with a kind, got {item!r:.200}")
        texts = {name: item.get(name) for name in _FIELDS}
        version = item.get("version")
        if not all(isinstance(text, str | None) for text in texts.values()) or type(version) not in (int, type(None)):
            raise InvalidResponse(f"a change should have texts, and a number as its version, got {item!r:.200}")
        return cls(item["kind"], version=version, **texts)

    @property
    def selector(self) -> str | None:
        """What names another version of the adapter since this change."""
        return {"alias-moved": self.alias, "version-published": LATEST}.get(self.kind)


class Watched:
    """What the watch of one client has told; safe to share between threads, of which one tells."""

    def __init__(self, service: ServiceState) -> None:
        self.is_on = False
        """Whether the client watches at all."""
        self.restart: Callable[[], None] | None = None
        """Starts the watch again in a forked child, when it is first needed there."""
        self._service = service
        self._told_until = 0.0  # of time.monotonic
        self._count = self._oldest = 0
        self._changed: dict[tuple[str | None, str | None], int] = {}
        renew_in_child(self)
        self.renew()

    def renew(self) -> None:
        """Tells nothing in a forked child until its own watch is there."""
        self._lock = threading.Lock()
        self._told_until = 0.0

    @property
    def is_alive(self) -> bool:
        """Whether the watch was heard from lately."""
        return time.monotonic() < self._told_until

    def stamp(self) -> Stamp | None:
        """Returns the moment before a request, by which its answer is judged later; None without a watch."""
        if not self.is_on:
            return None
        if (restart := self.restart) is not None:
            self.restart = None
            restart()
        return self._count, self._service.writes

    def confirms(self, tenant: str, adapter: str, stamp: Stamp | None) -> bool:
        """Returns whether an answer about an adapter, asked for at a moment, is certainly still true."""
        if stamp is None or not self.is_alive:
            return False
        count, writes = stamp
        least = max(self._oldest, self._changed.get((tenant, adapter), 0), self._changed.get((tenant, None), 0))
        return count >= least and writes == self._service.writes

    def lose(self) -> None:
        """Tells nothing until the watch is heard from again."""
        self._told_until = 0.0

    def begin_again(self) -> None:
        """Forgets up to which revision the watch has told: the service does not keep what came after it."""
        self._told_until, self._service.watched = 0.0, None

    def hear(self, revision: str) -> None:
        """Notes a sign of life: the watch has told of all changes up to a revision."""
        self._service.watched = revision
        if not self.is_alive:  # what was confirmed before the silence may have changed in it
            self.doubt_everything()
        self._told_until = time.monotonic() + SILENCE

    def begin_change(self, revision: str) -> int:
        """Returns the number of a change. Answers that are asked for from now on contain it."""
        self._service.watched = revision  # before the number, by which those answers are judged
        self._count += 1
        return self._count

    def apply(self, change: WatchedChange, number: int) -> None:
        """Doubts all answers about a change's adapter, or its tenant, that were asked for before the change."""
        with self._lock:
            if len(self._changed) >= _MOST_CHANGED:
                self._oldest = max(self._oldest, next(iter(self._changed.values())))
            put_last(self._changed, (change.tenant, change.adapter), number, _MOST_CHANGED)

    def doubt_everything(self) -> None:
        """Doubts every answer that was asked for before now."""
        self._count += 1
        self._oldest = self._count

    def end(self) -> None:
        """Tells nothing any more."""
        self.is_on, self._told_until, self._service.watched = False, 0.0, None


def moved_questions(memory: LocalCache, change: WatchedChange) -> Iterator[Question]:
    """Yields the cached questions that mean another version since a change."""
    if change.selector is None or change.tenant is None or change.adapter is None:
        return
    for key in memory.keys_of((change.tenant, change.adapter, change.selector)):
        yield Question.of_key(key)
