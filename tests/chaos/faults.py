"""The faults of a service, each a block that begins the fault and mends it at its end."""

import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Final, Generic, Literal, TypeVar

from prefix_service.blobs.folder import FolderBlobStore
from prefix_service.catalog.catalog import Catalog
from prefix_service.data_folder.opening import blob_folder, catalog_file
from prefix_service.prefix.references import parse_reference
from tests.chaos.service import Service
from tests.chaos.truth import SHAPE, Adapter, Content
from tests.chaos.work import Callers, Work
from tests.crash.folder import serving
from tests.mounts import laid_read_only

_SPARED: Final = 3  # versions whose blobs a fault takes


W = TypeVar("W", bound=Callers)


@dataclass(frozen=True, slots=True)
class Fault(Generic[W]):
    """A fault of what `W` uses, and what is expected of it while the fault lasts.

    Args:
        name: the fault's name, on the command line too.
        begin: returns the block of the fault.
        seconds: how long it lasts.
        unready: whether `/readyz` must answer 503 while it lasts.
        needs: what the machine must allow: nothing, mounts, or a file system of the data folder's own.
        replaces: whether a worker must be replaced, after so many seconds and 3.
        serves: whether every replica of a fleet must go on to serve what it has in memory.
    """

    name: str
    begin: Callable[[W], AbstractContextManager[None]]
    seconds: float = 8
    unready: bool = False
    needs: Literal["", "mounts", "file system"] = ""
    replaces: float | None = None
    serves: bool = False


@contextmanager
def _killed_worker(work: Work) -> Iterator[None]:
    os.kill(work.service.workers()[0], signal.SIGKILL)
    yield


@contextmanager
def _stopped_worker(work: Work) -> Iterator[None]:
    os.kill(work.service.workers()[0], signal.SIGSTOP)
    yield  # the supervisor ends it


@contextmanager
def _killed_supervisor(work: Work) -> Iterator[None]:
    work.service.kill()
    work.service.start()
    yield


@contextmanager
def _stopped_supervisor(work: Work) -> Iterator[None]:
    os.kill(work.service.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(work.service.pid, signal.SIGCONT)


@contextmanager
def _full_disk(work: Work) -> Iterator[None]:
    filler = work.service.data_dir / "filler"
    try:
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(b"\0" * (1 << 16))
        yield
    finally:
        filler.unlink()


@contextmanager
def _read_only_folder(work: Work) -> Iterator[None]:
    with laid_read_only(work.service.data_dir):
        yield


@contextmanager
def _no_blobs(work: Work) -> Iterator[None]:
    folder = blob_folder(work.service.data_dir)
    aside = folder.with_name("blobs aside")
    folder.rename(aside)
    try:
        yield
    finally:
        _merge(folder, aside)
        aside.rename(folder)


def _merge(made: Path, aside: Path) -> None:
    """Keeps what a service stored meanwhile in a folder that it made itself, because it may have acknowledged it."""
    for path in sorted(made.rglob("*"), reverse=True) if made.exists() else ():
        target = aside / path.relative_to(made)
        if path.is_dir():
            target.mkdir(exist_ok=True)
            path.rmdir()
        else:
            target.parent.mkdir(exist_ok=True)
            path.replace(target)
    if made.exists():
        made.rmdir()


_HOLD: Final = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], timeout=60, isolation_level=None)
connection.execute("BEGIN EXCLUSIVE")
print("locked", flush=True)
sys.stdin.read()
"""


@contextmanager
def _locked_catalog(work: Work) -> Iterator[None]:
    command = [sys.executable, "-c", _HOLD, str(catalog_file(work.service.data_dir))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        holder.stdout.readline()
        try:
            yield
        finally:
            holder.stdin.close()


@contextmanager
def _no_descriptors(work: Work) -> Iterator[None]:
    worker = work.service.workers()[0]
    before = resource.prlimit(worker, resource.RLIMIT_NOFILE)
    opened = len(list(Path(f"/proc/{worker}/fd").iterdir()))
    resource.prlimit(worker, resource.RLIMIT_NOFILE, (opened, before[1]))
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(worker, resource.RLIMIT_NOFILE, before)


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)


def _damage(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError), path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))


def _lost_blobs(harm: Callable[[Path], None]) -> Callable[[Work], AbstractContextManager[None]]:
    """Harms keys and values of some versions and weights of others; publishing the same files mends them."""

    @contextmanager
    def lost(work: Work) -> Iterator[None]:
        random = Random(0)  # noqa: S311 - any will do
        chosen: list[tuple[Adapter, int]] = []
        with work.quiet():
            for _ in range(100):
                found = work.truth.anything(random)
                if found is not None and found not in chosen and len(chosen) < 2 * _SPARED:
                    chosen.append(found)
                    found[0].spared.add(found[1])
        try:
            with _blobs_of(work.service, chosen) as paths:
                for number, (weights, key_values) in enumerate(paths):
                    harm(weights if number % 2 else key_values)
            with work.service.client() as client:
                for adapter, version in chosen:
                    for _ in range(6):  # of both workers
                        client.delete(f"{adapter.path}@{version}/residency")
            yield
            for adapter, version in chosen:
                _publish_again(work.service, adapter, adapter.versions[version])
        finally:
            for adapter, version in chosen:
                adapter.spared.discard(version)

    return lost


@contextmanager
def _blobs_of(service: Service, chosen: list[tuple[Adapter, int]]) -> Iterator[list[tuple[Path, Path]]]:
    """Yields the files of weights and of keys and values of versions."""
    store = FolderBlobStore(blob_folder(service.data_dir))
    with serving(service.data_dir) as opened:
        versions = [
            Catalog(opened.database).resolve(adapter.tenant, parse_reference(f"{adapter.name}@{version}"))
            for adapter, version in chosen
        ]
        yield [(store.path(version.weights), store.path(version.key_values)) for version in versions]


def _publish_again(service: Service, adapter: Adapter, content: Content) -> None:
    files = {"adapter_config.json": SHAPE.config, "adapter_model.safetensors": content.file}
    with service.client(timeout=60) as client:
        deadline = time.monotonic() + 90
        while (answer := client.post(f"{adapter.path}/versions", files=files)).status_code != 200:
            if time.monotonic() > deadline:
                raise RuntimeError(f"publishing again does not mend: {answer.status_code} {answer.text}")
            time.sleep(0.2)


FAULTS: Final[tuple[Fault[Work], ...]] = (
    Fault("kill worker", _killed_worker, 0, replaces=0),
    Fault("stop worker", _stopped_worker, 20, replaces=15),
    Fault("kill supervisor", _killed_supervisor, 0),
    Fault("stop supervisor", _stopped_supervisor),
    Fault("disk full", _full_disk, needs="file system", unready=True),
    Fault("disk read-only", _read_only_folder, needs="mounts", unready=True),
    Fault("blobs missing", _lost_blobs(_remove)),
    Fault("blobs damaged", _lost_blobs(_damage)),
    Fault("catalog locked 5 s", _locked_catalog, 5),
    Fault("catalog locked 40 s", _locked_catalog, 40, unready=True),
    Fault("no descriptors", _no_descriptors),
    Fault("blob folder away", _no_blobs, unready=True),
)
"""Every fault, in the order of the table."""
