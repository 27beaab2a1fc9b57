"""The numbers of several worker processes as those of one service: prometheus-client's multiprocess mode."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO, Final

from prometheus_client import CollectorRegistry, values
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

_FOLDER: Final = "PROMETHEUS_MULTIPROC_DIR"  # prometheus-client's own


@dataclass(frozen=True, slots=True)
class Place:
    """The files of one worker in the folder of all; its lock ends with the process, however that ends."""

    folder: Path
    number: int
    lock: BinaryIO

    def leave(self) -> None:
        """Remove the process's gauges; its counters stay."""
        mark_process_dead(self.number, str(self.folder))  # type: ignore[no-untyped-call]


@contextmanager
def shared_folder() -> Iterator[Path]:
    """A folder for the numbers of the workers that are started in the block."""
    with TemporaryDirectory(prefix="prefix-service-metrics-") as folder:
        os.environ[_FOLDER] = folder
        yield Path(folder)


def take_place() -> Place:
    """Returns the lowest place that no living worker has. A worker calls it before it makes its metrics.

    One that is started for another that died goes on with its counts, so files do not pile up as they would by
    process id, and no count ever falls.
    """
    folder = Path(os.environ[_FOLDER])
    place = next(place for number in count() if (place := _locked(folder, number)) is not None)
    by_place = values.MultiProcessValue(lambda: place.number)  # type: ignore[no-untyped-call]
    values.ValueClass = by_place
    return place


def _locked(folder: Path, number: int) -> Place | None:
    lock = (folder / f"{number}.lock").open("wb")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    return Place(folder, number, lock)


def whole_service(folder: Path) -> CollectorRegistry:
    """The numbers of all workers, as their files hold them when it is read."""
    registry = CollectorRegistry()
    MultiProcessCollector(registry, str(folder))  # type: ignore[no-untyped-call]
    return registry
