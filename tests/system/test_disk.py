"""`system.disk` translates the system's errors, and keeps files private."""

import errno
import logging
import os
import stat
from pathlib import Path

import pytest

from prefix_service.errors import OutOfSpace, PrefixServiceError, StorageFailed, Unavailable
from prefix_service.system.disk import tighten, translated, write_private


@pytest.mark.parametrize(
    ("number", "wanted"),
    [
        (errno.ENOENT, StorageFailed),
        (errno.ENOSPC, OutOfSpace),
        (errno.EDQUOT, OutOfSpace),
        (errno.EFBIG, OutOfSpace),
        (errno.EACCES, StorageFailed),
        (errno.EIO, StorageFailed),
        (errno.EROFS, StorageFailed),
        (errno.EMFILE, Unavailable),
        (errno.ESTALE, Unavailable),
    ],
)
def test_what_the_system_says(number: int, wanted: type[PrefixServiceError]) -> None:
    """`translated` chooses the error by errno; its message says what was tried, and shows no path."""
    with pytest.raises(PrefixServiceError, match=r"^cannot do it: ") as caught, translated("do it"):
        raise OSError(number, "?", "/a/secret/path")
    assert type(caught.value) is wanted
    assert "secret" not in caught.value.message


def test_other_errors_pass() -> None:
    """`translated` passes other exceptions on."""
    with pytest.raises(ZeroDivisionError), translated("do it"):
        raise ZeroDivisionError


def test_a_private_file_is_its_owners_and_is_never_overwritten(tmp_path: Path) -> None:
    """`write_private` creates a file with mode 0600, and raises FileExistsError for one that exists."""
    path = tmp_path / "key"
    write_private(path, "text")
    assert path.read_text() == "text\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(FileExistsError):
        write_private(path, "other")
    assert path.read_text() == "text\n"


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize(
    ("before", "after"), [(0o777, 0o700), (0o644, 0o600), (0o2770, 0o2700), (0o600, 0o600), (0o400, 0o400)]
)
def test_others_lose_what_they_may_do(tmp_path: Path, before: int, after: int) -> None:
    """`tighten` takes all permissions from group and others, and none from the owner."""
    (tmp_path / "x").mkdir()
    (tmp_path / "x").chmod(before)
    tighten(tmp_path / "x")
    assert mode_of(tmp_path / "x") == after


def test_what_cannot_be_tightened_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`tighten` warns, and does not fail, for a shared folder, another user's, or a mount without modes."""
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o1777)
    (tmp_path / "foreign").mkdir(0o755)
    (tmp_path / "mount").mkdir(0o755)
    with caplog.at_level(logging.WARNING, "prefix_service"):
        tighten(tmp_path / "shared")
        with monkeypatch.context() as other:
            other.setattr(os, "geteuid", lambda: 12345)
            tighten(tmp_path / "foreign")

        def refuse(*_: object, **__: object) -> None:
            raise PermissionError(errno.EPERM, "no")

        monkeypatch.setattr(Path, "chmod", refuse)
        tighten(tmp_path / "mount")
    assert [mode_of(tmp_path / name) for name in ("shared", "foreign", "mount")] == [0o1777, 0o755, 0o755]
    reasons = ("it is shared (sticky bit)", "it belongs to another user", "Operation not permitted")
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == list(reasons)
