"""`system.reserve`: a full disk has room for deletions, and for nothing else."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from prefix_service.catalog.catalog import Catalog
from prefix_service.catalog.database import Database
from prefix_service.catalog.records import COMMAND_LINE, NewVersion
from prefix_service.catalog.tenants import Tenants
from prefix_service.errors import OutOfSpace
from prefix_service.prefix.references import parse_reference
from prefix_service.system.reserve import RESERVED_BYTES, Reserve, reserve_file
from tests.mounts import fill, small_disk


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Three times the reserve."""
    with small_disk(tmp_path / "disk", 3 * RESERVED_BYTES):
        yield tmp_path / "disk"


def held(path: Path) -> int:
    """Bytes that a file takes of its disk."""
    return path.stat().st_blocks * 512


def test_it_holds_space_and_lends_it(disk: Path) -> None:
    """Only while the disk has less; afterwards it is held again."""
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


def test_it_holds_what_it_can(disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A disk that is full at the start, or is filled while the space is lent, leaves a part of it."""
    fill(disk, leave=RESERVED_BYTES // 2)
    reserve = Reserve(disk / "reserve")
    reserve.fill()
    assert held(disk / "reserve") == RESERVED_BYTES // 2
    assert "the disk is full" in caplog.text
    with reserve.lent():
        (disk / "kept").write_bytes(bytes(4096))
    assert RESERVED_BYTES // 4 < held(disk / "reserve") < RESERVED_BYTES // 2


def test_without_it_everything_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A folder of an earlier release has none, and one that cannot be written gets none."""
    with Reserve(tmp_path / "none" / "reserve").lent():
        pass
    Reserve(tmp_path / "none" / "reserve").fill()
    assert "no disk space is reserved for deletions: No such file or directory" in caplog.text


def test_what_deletes_works_on_a_full_disk(disk: Path) -> None:
    """Alias, version, adapter and tenant; what makes something is refused before and afterwards."""
    place = disk / "catalog.sqlite"
    database = Database(place)
    tenants, catalog = Tenants(database), Catalog(database)
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
    """Whatever the disk has left: a first allocation that failed must not be followed by one of the whole disk."""
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
