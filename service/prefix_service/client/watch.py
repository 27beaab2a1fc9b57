"""Follows the service's changes in a thread, for `client.watch`."""

import logging
import random
import threading
from collections.abc import Callable
from typing import Final

from prefix_service.client.flows.flows import Reading, refreshed
from prefix_service.client.flows.question import Question
from prefix_service.client.flows.watched import EVERYTHING, SILENCE, WatchedChange, moved_questions
from prefix_service.client.protocol import Request
from prefix_service.client.transport.pool import Exchanges, Interrupt, Pool
from prefix_service.client.transport.streams import MEDIA_TYPE, events
from prefix_service.client.transport.transport import Transport
from prefix_service.errors import ConnectionFailed, Gone, InvalidRequest, PrefixServiceError, Unavailable
from prefix_service.system.forks import renew_in_child

_FIRST_PAUSE: Final = 0.1
_LONGEST_PAUSE: Final = 5.0
_PREFETCHED_WITHIN: Final = 1.0
"""Seconds that an alias still means its old version while the new one is fetched."""
_MOST_PREFETCHES: Final = 4
_ENDS_WITHIN: Final = 5.0  # seconds

OnChange = Callable[[WatchedChange], object]

log = logging.getLogger(__name__)


class Watch:
    """The watch of one client: it follows changes until it is closed, or the service refuses the key. It reconnects by
    itself, and goes on where it was.

    `on_change` is called in its thread, after the change is applied here.
    """

    def __init__(self, reading: Reading, pools: Exchanges, transport: Transport, on_change: OnChange | None) -> None:
        self._reading, self._watched = reading, reading.watched
        self._pools, self._transport, self._on_change = pools, transport, on_change
        self._error: PrefixServiceError | None = None
        self._position: str | None = None
        self._prefetches: list[threading.Thread] = []
        self._is_closed = False
        self._watched.is_on = True
        renew_in_child(self)
        self._start()

    @property
    def is_alive(self) -> bool:
        """Whether aliases and `latest` are served from memory now: the service was heard from lately."""
        return self._watched.is_alive

    @property
    def error(self) -> PrefixServiceError | None:
        """The error that ended the watch, as `Unauthenticated` for a revoked key; None while it goes on."""
        return self._error

    def renew(self) -> None:
        """Prepares a forked child, in which this thread does not run: it starts when the client is first used."""
        if self._watched.is_on:
            self._prefetches = []
            self._stopped, self._interrupt = threading.Event(), Interrupt()
            self._watched.restart = self._start

    def _start(self) -> None:
        self._stopped, self._interrupt = threading.Event(), Interrupt()
        self._pause = _FIRST_PAUSE
        self._thread = threading.Thread(target=self._run, name="prefix-watch", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        avoided: Pool | None = None
        while not self._stopped.is_set():
            try:
                avoided = self._pools.any(avoided)
                try:
                    self._follow(avoided)
                finally:
                    self._watched.lose()
                self._stopped.wait(_FIRST_PAUSE)  # the service ends, or the key: it says so to the next request
            except Gone:
                self._begin_again()
            except (ConnectionFailed, Unavailable) as error:
                self._wait_after(error)
            except PrefixServiceError as error:
                if isinstance(error, InvalidRequest) and self._position is not None:  # of a service before this one
                    self._begin_again()
                    continue
                self._end(error)
            except Exception as error:  # noqa: BLE001 - a thread has no caller that could catch it
                self._end(PrefixServiceError(f"the watch of changes failed: {error!r}"))

    def _wait_after(self, error: PrefixServiceError) -> None:
        if not self._stopped.is_set():
            log.info("the watch of changes reconnects: %s", error)
        least = error.retry_after if isinstance(error, Unavailable) else 0
        self._stopped.wait(max(self._pause * (0.5 + random.random() / 2), least))  # noqa: S311 - it spreads clients
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)

    def _follow(self, pool: Pool) -> None:
        """Follows one stream until it ends."""
        headers = {"Accept": MEDIA_TYPE}
        if self._position is not None:
            headers["Last-Event-ID"] = self._position
        for position, data in events(pool, Request("GET", "/v1/changes", headers=headers), self._interrupt, SILENCE):
            if position:
                self._position = position
            if data is None:
                self._watched.hear(position)
                self._pause = _FIRST_PAUSE
            else:
                self._change(position, WatchedChange.of(data))
            if self._stopped.is_set():
                return

    def _change(self, position: str, change: WatchedChange) -> None:
        number = self._watched.begin_change(position)
        if change.kind == "base-model-changed":
            self._reading.fingerprints.clear()
        if questions := list(moved_questions(self._reading.memory, change)):
            self._prefetch(questions)
        self._watched.apply(change, number)
        self._report(change)

    def _prefetch(self, questions: list[Question]) -> None:
        """Fetches the answers that a change has moved, before they are asked for. It goes on beside the watch if it
        takes long."""
        self._prefetches = [each for each in self._prefetches if each.is_alive()]
        if len(self._prefetches) < _MOST_PREFETCHES:
            fetch = threading.Thread(target=self._fetch, args=(questions,), name="prefix-watch-fetch", daemon=True)
            self._prefetches.append(fetch)
            fetch.start()
            fetch.join(_PREFETCHED_WITHIN)

    def _fetch(self, questions: list[Question]) -> None:
        for question in questions:
            try:
                self._transport.run(refreshed(self._reading, question))
            except PrefixServiceError as error:
                log.info("%s was moved, and is not fetched in advance: %s", question, error)

    def _begin_again(self) -> None:
        """Follows from now on: what happened before is not kept."""
        self._position = None
        self._watched.begin_again()
        self._report(WatchedChange(EVERYTHING))

    def _report(self, change: WatchedChange) -> None:
        if self._on_change is not None:
            try:
                self._on_change(change)
            except Exception:
                log.exception("on_change failed for %s", change)

    def _end(self, error: PrefixServiceError) -> None:
        self._stopped.set()
        self._watched.end()
        self._error = error
        log.warning("the watch of changes has ended: %s", error)

    def close(self) -> None:
        """Ends the watch: aliases and `latest` are revalidated again."""
        self._watched.restart = None
        self._watched.end()
        self._stopped.set()
        self._interrupt.break_off()
        if self._thread is not threading.current_thread():
            self._thread.join(_ENDS_WITHIN)
