"""`service.disk`: the system's refusals in this project's words, and private files."""

import errno
import stat
from pathlib import Path

import pytest

from service.disk import translated, write_private
from service.errors import OutOfSpace, PrefixServiceError, StorageFailed, Unavailable


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
    """By its number; the message says what was tried, and no path."""
    with pytest.raises(PrefixServiceError, match=r"^cannot do it: ") as caught, translated("do it"):
        raise OSError(number, "?", "/a/secret/path")
    assert type(caught.value) is wanted
    assert "secret" not in caught.value.message


def test_other_errors_pass() -> None:
    """A defect stays a defect."""
    with pytest.raises(ZeroDivisionError), translated("do it"):
        raise ZeroDivisionError


def test_a_private_file_is_its_owners_and_is_never_overwritten(tmp_path: Path) -> None:
    """Mode 0600 from its first moment, whatever the umask."""
    path = tmp_path / "key"
    write_private(path, "text")
    assert path.read_text() == "text\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(FileExistsError):
        write_private(path, "other")
    assert path.read_text() == "text\n"
