"""`cli.folder_checks` checks data folders that others share, or that another user or release has made."""

import os
import sqlite3
from pathlib import Path

import pytest

from prefix_service.cli import folder_checks as checked
from prefix_service.cli.folder_checks import Check, folder_checks

ME = os.geteuid()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Returns a data folder as a service leaves it, without the files that the checks do not read."""
    made = tmp_path / "data"
    made.mkdir(mode=0o700)
    for name in ("key.secret", "lock"):
        (made / name).touch(mode=0o600)
    return made


def found(folder: Path, uid: int = ME) -> dict[str, Check]:
    """Returns the checks of a folder by their names."""
    return {check.name: check for check in folder_checks(folder, uid)}


def test_no_folder_is_no_fault(tmp_path: Path) -> None:
    """A missing folder is no fault, because a worker needs none."""
    assert found(tmp_path / "none").keys() == {"disk", "permissions"}
    assert found(tmp_path / "none")["permissions"].state == "ok"


def test_a_folder_of_its_own(folder: Path) -> None:
    """A sound folder without a catalog passes every check, because the first start creates the catalog."""
    assert {check.state for check in found(folder).values()} == {"ok"}


def test_a_folder_of_another_user(folder: Path) -> None:
    """A folder of another user is a warning that names the user who must run `serve`, even for root."""
    check = found(folder, ME + 1)["permissions"]
    assert check.state == "warning"
    assert check.advice == f"run `prefix-service serve` as user {ME} on this folder"


def test_a_folder_that_its_owner_cannot_write_to(folder: Path) -> None:
    """A folder that its owner cannot write to, as on a read-only medium, is reported with its mode."""
    folder.chmod(0o500)
    assert "closed to its owner (mode 500)" in found(folder)["permissions"].found
    folder.chmod(0o700)


def test_what_is_secret_and_open(folder: Path) -> None:
    """The advice names a folder and secrets that others can read, but no folder with a sticky bit."""
    folder.chmod(0o750)
    (folder / "key.secret").chmod(0o640)
    assert found(folder)["permissions"].advice == f"chmod go= {folder} {folder}/key.secret"
    folder.chmod(0o1777)
    assert found(folder)["permissions"].advice == f"chmod go= {folder}/key.secret"


@pytest.mark.skipif(ME != 0, reason="only root gives files away")
def test_a_file_that_another_user_made(folder: Path) -> None:
    """A file of another user, as root's commands leave it, is a warning with the `chown` to run."""
    os.chown(folder / "lock", 1234, 1234)
    check = found(folder)["permissions"]
    assert (check.state, check.advice) == ("warning", f"chown -R {ME} {folder}")
    assert "lock belongs to user 1234" in check.found


@pytest.mark.parametrize(("schema", "state"), [("0001", "ok"), ("9999", "warning"), (None, "warning")])
def test_a_catalog_of_another_release(folder: Path, schema: str | None, state: str) -> None:
    """An older catalog passes, because a start migrates it; a newer or unreadable one is a warning with advice."""
    with sqlite3.connect(folder / "catalog.sqlite") as connection:
        if schema is not None:
            connection.execute("CREATE TABLE alembic_version (version_num TEXT)")
            connection.execute("INSERT INTO alembic_version VALUES (?)", (schema,))
    connection.close()
    check = found(folder)["catalog"]
    assert check.state == state
    assert bool(check.advice) == (state == "warning")


def test_a_folder_on_a_network(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder on a network file system is a warning, because SQLite's locks may not work there."""
    mounts = tmp_path / "mountinfo"
    line = "36 35 98:0 / {} rw,noatime shared:1 - {} server:/x rw\n"
    mounts.write_text(line.format("/", "ext4") + line.format(folder.resolve(), "nfs4"))
    monkeypatch.setattr(checked, "_MOUNTS", mounts)
    check = found(folder)["disk"]
    assert check.state == "warning"
    assert "on a network (nfs4)" in check.found
    mounts.write_text(line.format("/", "nfs4") + line.format(folder.resolve(), "ext4"))
    assert found(folder)["disk"].state == "ok"
