"""The faults of a fleet, each a block that begins the fault and mends it at its end."""

import itertools
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Final

from tests.chaos.faults import Fault
from tests.chaos.fleet.fleet import Fleet, Process
from tests.chaos.fleet.work import FleetWork
from tests.processes import eventually

_AHEAD: Final = 300  # seconds
_LEFT: Final = 1 << 20  # bytes of a full disk

Begin = Callable[[FleetWork], AbstractContextManager[None]]


def _in_turn(pick: Callable[[Fleet], list[Process]], harm: Callable[[Process], AbstractContextManager[None]]) -> Begin:
    """Harms each of some processes, one after another."""

    turns = itertools.count()

    @contextmanager
    def begin(work: FleetWork) -> Iterator[None]:
        processes = pick(work.fleet)
        with harm(processes[next(turns) % len(processes)]):
            yield

    return begin


def _replicas(fleet: Fleet) -> list[Process]:
    return [each.process for each in fleet.replicas]


def _proxy(fleet: Fleet) -> list[Process]:
    return [fleet.proxy]


@contextmanager
def _killed(process: Process) -> Iterator[None]:
    process.kill()
    process.start()
    yield


@contextmanager
def _stopped(process: Process) -> Iterator[None]:
    process.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        process.signal(signal.SIGCONT)


def _postgresql(how: str) -> Begin:
    @contextmanager
    def begin(work: FleetWork) -> Iterator[None]:
        with getattr(work.fleet.postgresql, how)():
            yield

    return begin


def _s3(how: str) -> Begin:
    @contextmanager
    def begin(work: FleetWork) -> Iterator[None]:
        with getattr(work.fleet.seaweedfs, how)():
            yield

    return begin


@contextmanager
def _no_notifications(work: FleetWork) -> Iterator[None]:
    server, database = work.fleet.postgresql, work.fleet.database
    server.cut_notifications_off(database)
    server.end_sessions(database)
    try:
        yield
    finally:
        server.let_notifications_through(database)
        server.end_sessions(database)


@contextmanager
def _cut_postgresql(work: FleetWork) -> Iterator[None]:
    work.fleet.to_postgresql.cut()
    yield


@contextmanager
def _cut_s3(work: FleetWork) -> Iterator[None]:
    work.fleet.to_s3.cut()
    yield


@contextmanager
def _cut_callers(work: FleetWork) -> Iterator[None]:
    work.fleet.to_proxy.cut()
    yield


@contextmanager
def _full_disk(work: FleetWork) -> Iterator[None]:
    folder = work.fleet.replicas[-1].data_dir
    filler = folder / "filler"
    try:
        with filler.open("wb") as file:
            free = os.statvfs(folder)
            os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_frsize - _LEFT)
        yield
    finally:
        filler.unlink()


@contextmanager
def _clocks_apart(work: FleetWork) -> Iterator[None]:
    ahead, behind, *_ = work.fleet.replicas
    ahead.clock.move(_AHEAD)
    behind.clock.move(-_AHEAD)
    try:
        yield
    finally:
        ahead.clock.move(0)
        behind.clock.move(0)


@contextmanager
def _empty_replica(work: FleetWork) -> Iterator[None]:
    joining = work.fleet.joining
    joining.empty()
    joining.process.start()
    try:
        eventually(joining.is_ready)
        yield
    finally:
        joining.process.stop()


FAULTS: Final[tuple[Fault[FleetWork], ...]] = (
    Fault("kill replica", _in_turn(_replicas, _killed), 0),
    Fault("stop replica", _in_turn(_replicas, _stopped)),
    Fault("kill PostgreSQL", _postgresql("killed"), 20, serves=True),
    Fault("stop PostgreSQL", _postgresql("stopped"), 20, serves=True),
    Fault("kill S3 server", _s3("away"), 20, serves=True),
    Fault("stop S3 server", _s3("stopped"), 20, serves=True),
    Fault("kill proxy", _in_turn(_proxy, _killed), 0),
    Fault("stop proxy", _in_turn(_proxy, _stopped)),
    Fault("no notifications", _no_notifications, serves=True),
    Fault("PostgreSQL half-open", _cut_postgresql, serves=True),
    Fault("S3 half-open", _cut_s3, serves=True),
    Fault("callers half-open", _cut_callers),
    Fault("full disk", _full_disk, needs="file system", serves=True),
    Fault("clocks 5 min apart", _clocks_apart, serves=True),
    Fault("empty replica joins", _empty_replica, 5, serves=True),
)
"""Every fault, in the order of the table."""
