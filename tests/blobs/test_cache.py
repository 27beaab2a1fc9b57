"""`blobs.cache` keeps copies within its limit, across restarts and processes, and is never an error."""

import os
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from prefix_service.blobs.cache import BlobCache
from prefix_service.blobs.names import path_of
from tests.blobs.test_contract import digest_of

KB = 1000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "staging").mkdir()
    return tmp_path


def made(folder: Path, limit: int = 10 * KB, least_free: int = 0) -> BlobCache:
    return BlobCache(folder, folder / "staging", limit, least_free)


def blob(number: int, size: int = KB) -> tuple[str, memoryview]:
    data = number.to_bytes(4, "big") * (size // 4)
    return digest_of(data), memoryview(data)


def opened(cache: BlobCache, number: int, size: int = KB) -> bytes | None:
    """Returns the copy of a blob, now the one that was opened last; the times of files have coarse steps."""
    digest, _ = blob(number, size)
    if (file := cache.open(digest)) is None:
        return None
    with file:
        os.utime(file.fileno(), (next(_TIMES),) * 2)
        return file.read()


_TIMES: Iterator[int] = iter(range(2_000_000_000, 2_100_000_000))


def keep(cache: BlobCache, number: int, size: int = KB) -> None:
    cache.keep(*blob(number, size))
    opened(cache, number, size)


def held(cache: BlobCache, numbers: range = range(100)) -> set[int]:
    return {number for number in numbers if (cache._folder / path_of(blob(number)[0])).exists()}


def test_a_copy_comes_back(folder: Path) -> None:
    """A blob that was kept is opened, one that was dropped, or never kept, is not."""
    cache = made(folder)
    keep(cache, 1)
    assert opened(cache, 1) == bytes(blob(1)[1])
    cache.drop(blob(1)[0])
    cache.drop(blob(2)[0])
    assert opened(cache, 1) is None
    assert list((folder / "staging").iterdir()) == []


def test_the_least_recently_opened_go_first(folder: Path) -> None:
    """Copies beyond the limit displace those that were opened the longest ago."""
    cache = made(folder)
    for number in range(10):
        keep(cache, number)
    opened(cache, 0)
    keep(cache, 10)
    assert held(cache) == {0, *range(3, 11)}  # a tenth is free afterwards


def test_a_blob_that_is_kept_twice_counts_once(folder: Path) -> None:
    """Keeping a blob again displaces nothing."""
    cache = made(folder)
    for number in [*range(9), *range(9), *range(9)]:
        keep(cache, number)
    assert held(cache) == set(range(9))


def test_a_blob_larger_than_the_cache_is_not_kept(folder: Path) -> None:
    """It displaces nothing, whether it comes as bytes or as a file, which is removed."""
    cache = made(folder)
    keep(cache, 1)
    cache.keep(*blob(2, 11 * KB))
    file = folder / "staging" / "file"
    file.write_bytes(blob(2, 11 * KB)[1])
    cache.take(blob(2, 11 * KB)[0], file)
    assert not file.exists()
    assert held(cache) == {1}
    assert opened(cache, 2, 11 * KB) is None


def test_a_restart_counts_what_is_there(folder: Path) -> None:
    """Another process, also one with a smaller limit, keeps the copies and the order in which they go."""
    first = made(folder)
    for number in range(9):
        keep(first, number)
    second = made(folder, limit=5 * KB)
    assert opened(second, 0) == bytes(blob(0)[1])
    keep(second, 50)
    assert held(second) == {50, 0, 8, 7}


def test_processes_share_one_limit(folder: Path) -> None:
    """Several caches on one folder, in many threads, stay within the limit together."""
    caches = [made(folder) for _ in range(4)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: caches[number % 4].keep(*blob(number)), range(100)))
    assert 5 <= len(held(caches[0])) <= 10
    assert int((folder / "used").read_text()) == KB * len(held(caches[0]))


def test_the_rest_of_the_disk_is_left_alone(folder: Path) -> None:
    """Nothing is kept on a disk that would have too little room left."""
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    cache = made(folder, least_free=2 * free)
    keep(cache, 1)
    assert held(cache) == set()
    assert list((folder / "staging").iterdir()) == []


def test_a_disk_that_fails_is_no_error(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A folder that is gone, or that files cannot be moved to, is logged, and nothing stays behind."""
    cache = made(folder)
    (folder / path_of(blob(1)[0])[:2]).write_text("in the way")
    keep(cache, 1)
    assert caplog.messages == ["a blob is not cached: File exists"]
    assert list((folder / "staging").iterdir()) == []
    shutil.rmtree(folder / "staging")
    keep(cache, 2)
    cache.drop(blob(2)[0])
    assert held(cache) == set()


def test_an_open_copy_outlives_its_eviction(folder: Path) -> None:
    """A reader goes on with a copy that is displaced meanwhile."""
    cache = made(folder)
    keep(cache, 1)
    file = cache.open(blob(1)[0])
    assert file is not None
    with file:
        for number in range(10, 30):
            keep(cache, number)
        assert held(cache, range(10)) == set()
        assert file.read() == blob(1)[1]


def test_removals_race_with_additions(folder: Path) -> None:
    """The count stays right while threads keep and drop the same blobs."""
    cache, stop = made(folder), threading.Event()

    def drop_on() -> None:
        while not stop.is_set():
            for number in range(5):
                cache.drop(blob(number)[0])

    with ThreadPoolExecutor(2) as pool:
        pool.submit(drop_on)
        for turn in range(200):
            cache.keep(*blob(turn % 5))
        stop.set()
    assert int((folder / "used").read_text()) == KB * len(held(cache))
