"""`python -m tests.benchmarks.blobs`: a cold read of a blob from a folder, a bucket on SeaweedFS, and a local copy."""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final
from unittest.mock import patch

from prefix_service.blobs.bucket import Bucket
from prefix_service.blobs.folder import FolderBlobStore
from prefix_service.blobs.port import BlobStore
from prefix_service.blobs.s3 import S3BlobStore
from tests.conftest import free_port
from tests.seaweedfs import SeaweedFS

_SIZES: Final = (10_000_000, 268_000_000)
_TIMES: Final = 5
_MB: Final = 1_000_000


@contextmanager
def _stores(folder: Path) -> Iterator[dict[str, tuple[BlobStore, Callable[[str], object]]]]:
    """Yields stores, each with what makes its next read cold."""
    server = SeaweedFS(free_port)
    try:
        with patch.dict(os.environ, server.environment):
            cached = S3BlobStore(Bucket("s3://benchmark/a"), folder / "copies", 1 << 40)
            bare = S3BlobStore(Bucket("s3://benchmark/b"), folder / "none", 1)
        yield {
            "folder": (FolderBlobStore(folder / "blobs"), lambda _: None),
            "bucket": (bare, lambda _: None),
            "bucket, and a copy is made": (cached, cached._drop),
            "copy of a bucket's blob": (cached, lambda _: None),
        }
    finally:
        server.remove()


def _peak() -> int:
    """Returns the most bytes of memory since the last call."""
    status = Path("/proc/self/status").read_text()
    Path("/proc/self/clear_refs").write_text("5")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def main() -> None:
    """Prints a table."""
    print("| blob | read from | ms | MB/s | memory, in blobs |\n|---|---|---|---|---|")  # noqa: T201
    with tempfile.TemporaryDirectory() as name, _stores(Path(name)) as stores:
        for size in _SIZES:
            data = os.urandom(size)
            for kind, (store, chill) in stores.items():
                staged = store.stage()
                staged.write(data)
                digest = staged.commit()
                taken, _ = [], _peak()
                before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
                for _ in range(_TIMES):
                    chill(digest)
                    began = time.perf_counter()
                    read = store.read(digest)
                    taken.append(time.perf_counter() - began)
                    del read
                seconds, held = statistics.median(taken), (_peak() - before) / size
                print(  # noqa: T201
                    f"| {size // _MB} MB | {kind} | {1000 * seconds:.0f} | {size / _MB / seconds:.0f} | {held:.2f} |"
                )


if __name__ == "__main__":
    main()
