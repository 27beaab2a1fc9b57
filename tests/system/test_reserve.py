"""`system.reserve` holds disk space back, so that deletions, and nothing else, work on a full disk."""

import errno
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from prefix_service.catalog.database import Database
from prefix_service.catalog.records import COMMAND_LINE, NewVersion
from prefix_service.catalog.tenants import Tenants
from prefix_service.errors import OutOfSpace
from prefix_service.prefix.references import parse_reference
from prefix_service.system.reserve import RESERVED_BYTES, Reserve, reserve_file
from tests.catalog.conftest import HoldingCatalog
from tests.mounts import fill, small_disk


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Yields a disk of three times the reserve."""
    with small_disk(tmp_path / "disk", 3 * RESERVED_BYTES):
        yield tmp_path / "disk"


def held(path: Path) -> int:
    """Returns the bytes that a file takes of its disk."""
    return path.stat().st_blocks * 512


def test_it_holds_space_and_lends_it(disk: Path) -> None:
    """The reserve lends its space only while the disk is full, and holds it again afterwards."""
    path = disk / "reserve"
    reserve = Reserve(path)
    reserve.fill()
    reserve.fill()
    assert held(path) == RESERVED_BYTES
    with reserve.lent():
        assert held(path) == RESERVED_BYTES
    fill(disk)
    with reserve.lent():
        (disk / "journal").write_bytes(bytes(RESERVED_BYTES // 2))
        (disk / "journal").unlink()
    assert held(path) == RESERVED_BYTES
    with pytest.raises(OSError, match="No space left"):
        (disk / "more").write_bytes(bytes(8192))


def test_what_is_lent_is_not_taken_for_space_that_is_left(disk: Path) -> None:
    """While one process uses the reserve, the next waits for it, and does not take its space for free."""
    path = disk / "reserve"
    Reserve(path).fill()
    fill(disk)
    entered = threading.Event()

    def deletes() -> bytes:
        with Reserve(path).lent():
            entered.set()
            (disk / "journal").write_bytes(bytes(RESERVED_BYTES // 2))
            (disk / "journal").unlink()
        return b"done"

    with ThreadPoolExecutor(1) as pool:
        with Reserve(path).lent():
            other = pool.submit(deletes)
            assert not entered.wait(0.2)
        assert other.result(60) == b"done"
    assert held(path) == RESERVED_BYTES


def test_it_holds_what_it_can(disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The reserve holds a part if the disk is full at the start, or is filled while the space is lent."""
    fill(disk, leave=RESERVED_BYTES // 2)
    reserve = Reserve(disk / "reserve")
    reserve.fill()
    assert held(disk / "reserve") == RESERVED_BYTES // 2
    assert "the disk is full" in caplog.text
    with reserve.lent():
        (disk / "kept").write_bytes(bytes(4096))
    assert RESERVED_BYTES // 4 < held(disk / "reserve") < RESERVED_BYTES // 2


def test_without_it_everything_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A missing reserve lends nothing, and one that cannot be written is logged; neither raises."""
    with Reserve(tmp_path / "none" / "reserve").lent():
        pass
    Reserve(tmp_path / "none" / "reserve").fill()
    assert "no disk space is reserved for deletions: No such file or directory" in caplog.text


def test_what_deletes_works_on_a_full_disk(disk: Path) -> None:
    """On a full disk aliases, versions, adapters and tenants can be deleted, and nothing can be added."""
    place = disk / "catalog.sqlite"
    database = Database(place)
    tenants, catalog = Tenants(database), HoldingCatalog(database)
    tenants.put("acme", COMMAND_LINE)
    manifest = "x" * 2000
    for number in range(200):
        new = NewVersion(f"d{number}", manifest, None, f"w{number}", 1, "float32", f"k{number}", 1)
        catalog.add_version("acme", "a", new, COMMAND_LINE)
    catalog.put_alias("acme", "a", "prod", 1, COMMAND_LINE)
    Reserve(reserve_file(place)).fill()
    fill(disk)
    with pytest.raises(OutOfSpace):
        catalog.put_alias("acme", "a", "dev", 1, COMMAND_LINE)
    catalog.delete_alias("acme", "a", "prod", COMMAND_LINE)
    catalog.delete("acme", parse_reference("a@1"), COMMAND_LINE)
    catalog.delete("acme", parse_reference("a"), COMMAND_LINE)
    tenants.delete("acme", COMMAND_LINE)
    with pytest.raises(OutOfSpace):
        tenants.put("x" * 2_000_000, COMMAND_LINE)
    assert held(reserve_file(place)) > 0.9 * RESERVED_BYTES
    assert os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize < RESERVED_BYTES
    database.close()


def test_an_allocation_that_fails_takes_no_more_than_the_reserve(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a failed allocation the reserve does not allocate the whole disk."""
    allocate, failed = os.posix_fallocate, list[int]()

    def fails_once(handle: int, offset: int, nbytes: int) -> None:
        if not failed:
            failed.append(nbytes)
            raise OSError(errno.EDQUOT, "no quota")
        allocate(handle, offset, nbytes)

    monkeypatch.setattr(os, "posix_fallocate", fails_once)
    Reserve(disk / "reserve").fill()
    assert failed
    assert held(disk / "reserve") == RESERVED_BYTES
