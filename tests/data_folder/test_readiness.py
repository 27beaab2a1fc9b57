"""`data_folder.readiness` runs its checks once for all callers, at most once a second, and never for long."""

import asyncio
import logging
import threading
import time
from pathlib import Path

import pytest
from pydantic import SecretStr

from prefix_service.blobs.folder import FolderBlobStore
from prefix_service.catalog.database import Database
from prefix_service.data_folder import readiness as module
from prefix_service.data_folder.readiness import Readiness, checks_of
from prefix_service.errors import OutOfSpace, StorageFailed
from prefix_service.settings import Settings


class Disk:
    """A check that counts its runs, and that a test can make fail or hang."""

    def __init__(self) -> None:
        self.looks = 0
        self.reason: str | None = None
        self.answers = threading.Event()
        self.answers.set()

    def __call__(self) -> None:
        self.looks += 1
        self.answers.wait(60)
        if self.reason is not None:
            raise OutOfSpace(self.reason)


async def reason(readiness: Readiness) -> str | None:
    try:
        await readiness.require()
    except StorageFailed as error:
        return error.message
    return None


async def test_many_callers_cause_one_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred callers in parallel, and one as long as the result is remembered, cause one check."""
    monkeypatch.setattr(module, "_REMEMBERED", 60.0)
    disk = Disk()
    readiness = Readiness([disk], deadline=60)
    assert await asyncio.gather(*(reason(readiness) for _ in range(100))) == [None] * 100
    assert await reason(readiness) is None
    assert disk.looks == 1


async def test_what_is_wrong_is_said_and_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Callers get the reason as long as it lasts; the log has its beginning and its end, once each."""
    monkeypatch.setattr(module, "_REMEMBERED", 0.0)
    caplog.set_level(logging.INFO, "prefix_service")
    disk, sound = Disk(), Disk()
    readiness = Readiness([sound, disk], deadline=60)
    for said in (None, "no space left", "no space left", None, None):
        disk.reason = said
        assert await reason(readiness) == said
    assert [record.message for record in caplog.records] == ["not ready: no space left", "ready again"]
    assert (disk.looks, sound.looks) == (5, 5)


async def test_a_hanging_check_is_a_reason_and_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """A caller waits no longer than the deadline, a hanging check starts no second thread, and recovery is noticed."""
    monkeypatch.setattr(module, "_REMEMBERED", 0.0)
    disk = Disk()
    readiness = Readiness([disk], deadline=0.2)
    disk.answers.clear()
    began = time.monotonic()
    for _ in range(20):
        assert await reason(readiness) == "the disk or the catalog has not answered within 0.2 seconds"
    assert time.monotonic() - began >= 0.2
    assert disk.looks == 1
    disk.answers.set()
    await asyncio.wait([readiness._running] if readiness._running else [])
    monkeypatch.setattr(readiness, "_deadline", 60.0)
    assert await reason(readiness) is None


def test_replicas_without_their_catalog_are_ready_as_long_as_they_serve(tmp_path: Path) -> None:
    """A service on a data folder is not: it alone has lost its catalog."""
    settings = Settings(data_dir=tmp_path)
    shared = settings.model_copy(update={"catalog_url": SecretStr("postgresql+psycopg://u@h/d")})
    database, blobs = Database(tmp_path / "catalog.sqlite"), FolderBlobStore(tmp_path / "blobs")
    with database.writing() as connection:
        connection.exec_driver_sql("DROP TABLE aliases")
        connection.exec_driver_sql("DROP TABLE versions")

    def check(of: Settings, *, are_known: bool) -> None:
        for one in checks_of(of, database, blobs, lambda: are_known):
            one()

    check(shared, are_known=True)
    for of, are_known in ((shared, False), (settings, True), (settings, False)):
        with pytest.raises(StorageFailed, match="the catalog refused"):
            check(of, are_known=are_known)
    database.close()
