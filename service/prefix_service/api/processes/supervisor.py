"""Keeps a number of worker processes alive: restarts those that died; ends on a signal, or if no worker can start.

Each worker sends signs of life from its event loop, on a socket of its own. The supervisor waits for these sockets, for
the ends of processes and for signals, all in one call, and never for one of them alone.

Existing supervisors do not suffice. uvicorn's own asks its workers one after another whether they are alive, so that a
hanging worker hides the death of another; it gives up, with status 0, if a replacement cannot start; and its workers
outlive it. gunicorn watches each worker separately, but forks, which CUDA does not survive, and ends all workers if one
cannot start; uvicorn's class for it is deprecated. hypercorn and granian have HTTP servers of their own, which parse
requests differently from what is tested here. circus watches processes, not event loops.
"""

import contextlib
import logging
import math
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from typing import Any, Final

from prefix_service.errors import Unavailable

log = logging.getLogger("prefix_service")

SIGN: Final = b"\n"
"""A sign of life; the first one reports that the worker is ready. Other bytes are the reason why it cannot start."""

_SPAWN: Final = multiprocessing.get_context("spawn")


@dataclass(frozen=True, slots=True)
class Timeouts:
    """The time limits of the supervisor, in seconds.

    A worker sends a sign each second. Loads, hashes and page faults delay a sign by well below a second, swapping by
    several: a worker that was silent for 15 seconds serves nobody. A start can take minutes while other processes
    import torch from the same slow disk.
    """

    start: float = 180
    silence: float = 15
    end: float = 35  # the grace period of requests, and time to close the app
    first_pause: float = 1
    longest_pause: float = 30

    @property
    def turn(self) -> float:
        """The longest time that the supervisor waits before it looks at its own clock."""
        return self.silence / 15


@dataclass(slots=True, eq=False)
class _Worker:
    """A running process. It is killed at `deadline`, on the supervisor's clock, unless a sign comes."""

    process: SpawnProcess
    signs: socket.socket
    deadline: float
    is_ready: bool = False
    is_open: bool = True
    reason: str = ""

    @property
    def pid(self) -> int | None:
        return self.process.pid


class Supervisor:
    """Starts `work(signs, pid of the supervisor, *arguments)` in `count` spawned processes, and again if one ends.

    Args:
        count: the number of processes.
        work: runs in each process; sends `SIGN` on the socket `signs` once it is ready, and each second from then on.
        arguments: further arguments of `work`; sockets are inherited.
        on_ready: is called once, when the first worker is ready.
        timeouts: the time limits.
    """

    def __init__(
        self,
        count: int,
        work: Callable[..., None],
        arguments: tuple[Any, ...],
        on_ready: Callable[[], None],
        timeouts: Timeouts = Timeouts(),
    ) -> None:
        self._count, self._work, self._arguments = count, work, arguments
        self._on_ready, self._timeouts = on_ready, timeouts
        self._workers: list[_Worker] = []
        self._now = 0.0  # seconds that this process has run: no worker counts as silent while the machine is stopped
        self._due: list[float] = []  # when the replacements of ended workers are started
        self._failures = 0  # failed starts since the last successful one
        self._was_ready = False
        self._reason = ""  # of the last failed start
        self._end = math.inf  # when workers that have not ended are killed
        self._is_ending = False

    def run(self) -> None:
        """Serves until SIGTERM, SIGINT or SIGHUP, then lets the workers finish; a second signal kills them.

        Raises:
            Unavailable: no worker could start.
        """
        with _signals() as signals:
            try:
                for _ in range(self._count):
                    self._start()
                while self._workers or (self._was_ready and not self._is_ending):
                    self._turn(signals)
            finally:
                for worker in self._workers:
                    worker.process.kill()
        if not self._is_ending:
            raise Unavailable(f"no worker could start: {self._reason}")

    def _turn(self, signals: socket.socket) -> None:
        """Waits until something happens, and reacts to it."""
        sources: list[Any] = [signals, *(worker.process.sentinel for worker in self._workers)]
        sources += [worker.signs for worker in self._workers if worker.is_open]
        next_deadline = min([self._end, *self._due_now(), *(worker.deadline for worker in self._workers)])
        timeout = min(max(next_deadline - self._now, 0), self._timeouts.turn)
        before = time.monotonic()
        happened = wait(sources, timeout)
        self._now += min(time.monotonic() - before, self._timeouts.turn)
        for worker in list(self._workers):
            if worker.signs in happened:
                self._receive_signs(worker)
            if worker.process.sentinel in happened:
                self._remove_ended(worker)
            elif worker.deadline <= self._now:
                self._kill_silent(worker)
        if signals in happened:
            self._begin_end(signals.recv(4096))
        if self._end <= self._now:
            self._kill_all()
        for due in [due for due in self._due_now() if due <= self._now]:
            self._due.remove(due)
            self._start()

    def _due_now(self) -> list[float]:
        """Returns when workers are started again; before the first success, no start is repeated."""
        return self._due if self._was_ready else []

    def _start(self) -> None:
        try:
            mine, its = socket.socketpair()
            with its:
                process = _SPAWN.Process(target=self._work, args=(its, os.getpid(), *self._arguments))
                try:
                    process.start()
                except OSError:
                    mine.close()
                    raise
        except OSError as error:  # no process, no descriptor, no memory
            self._failed(None, os.strerror(error.errno or 0))
        else:
            mine.setblocking(False)
            self._workers.append(_Worker(process, mine, self._now + self._timeouts.start))

    def _receive_signs(self, worker: _Worker) -> None:
        try:
            received = worker.signs.recv(1 << 16)
        except OSError:
            received = b""
        if not received:  # the worker is ending: its sentinel reports when
            worker.is_open = False
            return
        if worker.deadline < math.inf:  # not killed yet
            worker.deadline = self._now + self._timeouts.silence
        worker.reason += received.replace(SIGN, b"").decode(errors="replace")
        if SIGN in received and not worker.is_ready:
            worker.is_ready, self._failures = True, 0
            log.info("a worker is ready", extra={"pid": worker.pid})
            if not self._was_ready:
                self._was_ready = True
                self._on_ready()

    def _kill_silent(self, worker: _Worker) -> None:
        silence = self._timeouts.silence if worker.is_ready else self._timeouts.start
        worker.reason = f"no sign of life for {silence:g} seconds"
        worker.deadline = math.inf
        worker.process.kill()

    def _remove_ended(self, worker: _Worker) -> None:
        """Removes a worker that has ended, and schedules its replacement."""
        worker.process.join()
        worker.signs.close()
        self._workers.remove(worker)
        how = _how(worker.process.exitcode)
        reason = f"{worker.reason} ({how})" if worker.reason else how
        if self._is_ending:
            log.info("a worker has ended", extra={"pid": worker.pid, "reason": reason})
        elif worker.is_ready:
            log.error("a worker died, and is replaced", extra={"pid": worker.pid, "reason": reason})
            self._due.append(self._now)
        else:
            self._failed(worker.pid, reason)
        worker.process.close()

    def _failed(self, pid: int | None, reason: str) -> None:
        pause = min(self._timeouts.first_pause * 2 ** min(self._failures, 16), self._timeouts.longest_pause)
        self._failures += 1
        self._reason = reason
        self._due.append(self._now + pause)
        log.error("a worker could not start", extra={"pid": pid, "reason": reason, "again_in": pause})

    def _begin_end(self, numbers: bytes) -> None:
        for number in numbers:  # no other signal has a handler here
            log.info("asked to end", extra={"signal": signal.Signals(number).name})
            if self._is_ending:
                self._end = self._now
                continue
            self._is_ending, self._end = True, self._now + self._timeouts.end
            self._due.clear()
            for worker in self._workers:
                worker.process.terminate()

    def _kill_all(self) -> None:
        self._end = math.inf
        for worker in self._workers:
            worker.reason = "killed before it had finished"
            worker.process.kill()


def _how(exitcode: int | None) -> str:
    """Returns an exit code of multiprocessing as text."""
    if exitcode is None or exitcode >= 0:
        return f"exit status {exitcode}"
    return f"killed by {next((each.name for each in signal.Signals if each == -exitcode), f'signal {-exitcode}')}"


@contextlib.contextmanager
def _signals() -> Iterator[socket.socket]:
    """Yields a socket on which SIGTERM, SIGINT and SIGHUP arrive, one byte each, so that one call can wait for them
    too. A SIGHUP that is ignored, as under `nohup`, stays so."""
    reader, writer = socket.socketpair()
    with reader, writer:
        reader.setblocking(False)
        writer.setblocking(False)
        numbers = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        handlers = {number: signal.signal(number, lambda *_: None) for number in numbers}
        descriptor = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        try:
            yield reader
        finally:
            signal.set_wakeup_fd(descriptor)
            for number, handler in handlers.items():
                signal.signal(number, handler)
