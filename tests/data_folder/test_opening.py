"""`data_folder.opening` admits one service to a folder, and its first start creates the folder's files."""

import multiprocessing
import os
import sqlite3
import stat
import subprocess
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from prefix_service.blobs.folder import FolderBlobStore
from prefix_service.catalog.records import COMMAND_LINE, Principal
from prefix_service.data_folder.opening import bootstrap_file, catalog_file, keys_of, opened
from prefix_service.errors import Conflict, NotFound, StorageFailed, Unauthenticated
from prefix_service.settings import Settings
from tests.api.helpers import upload
from tests.commands import PREFIX_SERVICE
from tests.conftest import running_server


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path / "deep" / "data")


def start(settings: Settings) -> None:
    """Starts and stops a service."""
    with opened(settings):
        pass


def whose(settings: Settings, text: str) -> Principal:
    with keys_of(settings) as (keyring, _):
        return keyring.verify(text)


def test_a_first_start_makes_a_platform_admins_key(settings: Settings) -> None:
    """The first start writes a working key into a file that only its owner can read."""
    start(settings)
    path = bootstrap_file(settings.data_dir)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    principal = whose(settings, path.read_text().strip())
    assert (principal.tenant, principal.scope) == (None, "admin")


def test_a_second_start_makes_none(settings: Settings) -> None:
    """A later start neither replaces the key file nor writes it again if it was removed."""
    start(settings)
    path = bootstrap_file(settings.data_dir)
    first = path.read_text()
    start(settings)
    assert path.read_text() == first
    path.unlink()
    start(settings)
    assert not path.exists()
    assert whose(settings, first.strip()).scope == "admin"


def test_dev_mode_makes_no_key(settings: Settings) -> None:
    """A start in dev mode creates neither a key nor its file."""
    start(settings.model_copy(update={"dev": True}))
    assert not bootstrap_file(settings.data_dir).exists()
    with keys_of(settings) as (keyring, _):
        assert keyring.listed(None) == []


def test_a_second_service_is_refused(settings: Settings) -> None:
    """A second service gets Conflict while the first one runs, and the folder is free afterwards."""
    with opened(settings):
        with pytest.raises(Conflict, match=r"another prefix-service runs on the data folder .*: stop it first"):
            start(settings)
        with pytest.raises(Conflict):
            start(settings)
    start(settings)


def try_to_start(data_dir: Path) -> str:
    """Starts a service in another process; returns "started" or the error's code."""
    try:
        start(Settings(data_dir=data_dir))
    except Conflict as error:
        return error.code
    return "started"


def test_a_second_service_in_another_process_is_refused(settings: Settings) -> None:
    """The lock excludes other processes, because the system holds it."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        with opened(settings):
            assert pool.submit(try_to_start, settings.data_dir).result(180) == "conflict"
        assert pool.submit(try_to_start, settings.data_dir).result(180) == "started"


def test_the_lock_is_free_after_a_failure(settings: Settings) -> None:
    """The lock is released if the block raises or the service cannot start."""
    with pytest.raises(KeyError), opened(settings):
        raise KeyError
    catalog_file(settings.data_dir).write_bytes(b"garbage" * 1000)
    for _ in range(2):
        with pytest.raises(StorageFailed):
            start(settings)


def test_a_refused_start_changes_nothing(settings: Settings) -> None:
    """A refused start does not sweep the uploads of the service that runs."""
    with opened(settings):
        blob = FolderBlobStore(settings.data_dir / "blobs").stage()
        blob.write(b"half")
        with pytest.raises(Conflict):
            start(settings)
        blob.commit()
    start(settings)


def test_a_start_sweeps_what_a_crash_left(settings: Settings) -> None:
    """A start removes uploads that were never committed."""
    start(settings)
    left = settings.data_dir / "blobs" / "staging" / "left"
    left.touch()
    start(settings)
    assert not left.exists()


def test_keys_can_be_made_while_a_service_runs(settings: Settings) -> None:
    """A key made while a service runs is still valid after it has stopped."""
    with opened(settings), keys_of(settings) as (keyring, tenants):
        tenants.put("acme", COMMAND_LINE)
        _, text = keyring.create("acme", "read", "ci", COMMAND_LINE)
    assert whose(settings, text).tenant == "acme"


def test_keys_are_in_a_folder_that_a_service_made(settings: Settings) -> None:
    """`keys_of` refuses a missing or empty folder and creates nothing in it."""
    folder = settings.data_dir
    for _ in range(2):
        with (
            pytest.raises(NotFound, match=r"is not a data folder of a service: .*catalog\.sqlite is missing"),
            keys_of(settings),
        ):
            pass
        assert not folder.exists() or list(folder.iterdir()) == []
        folder.mkdir(parents=True, exist_ok=True)


def test_replicas_share_the_keys_secret(settings: Settings, tmp_path: Path) -> None:
    """A replica with the same secret file accepts a key that the first service made; one with another does not."""
    shared = settings.model_copy(update={"key_secret_file": tmp_path / "shared.secret"})
    start(shared)
    text = bootstrap_file(shared.data_dir).read_text().strip()
    replica = shared.model_copy(update={"data_dir": tmp_path / "replica"})
    replica.data_dir.mkdir()
    with (
        sqlite3.connect(catalog_file(shared.data_dir)) as source,
        sqlite3.connect(catalog_file(replica.data_dir)) as target,
    ):
        source.backup(target)
    source.close()
    target.close()
    assert whose(replica, text).scope == "admin"
    assert not (shared.data_dir / "key.secret").exists()
    with pytest.raises(Unauthenticated):
        whose(replica.model_copy(update={"key_secret_file": None}), text)


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def test_secrets_are_private_under_any_umask(settings: Settings) -> None:
    """Secret files have mode 0600, whatever the umask."""
    with umask(0):
        start(settings)
    for name in ("key.secret", "bootstrap.key", "lock"):
        assert stat.S_IMODE((settings.data_dir / name).stat().st_mode) == 0o600


def test_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    """A path that cannot be a folder raises StorageFailed with the system's reason."""
    (tmp_path / "file").touch()
    with pytest.raises(StorageFailed, match=r"cannot use the data folder .*: Not a directory"):
        start(Settings(data_dir=tmp_path / "file" / "data"))


def modes(folder: Path) -> dict[str, int]:
    """Returns the modes of a folder and of everything in it except the log, which the tests write."""
    found = {str(path.relative_to(folder)): stat.S_IMODE(path.lstat().st_mode) for path in (folder, *folder.rglob("*"))}
    return {name: mode for name, mode in found.items() if name != "serve.log"}


def test_a_data_folder_is_its_owners_alone_whatever_the_umask(tmp_path: Path) -> None:
    """Folders have mode 0700 and files 0600, in a copy too; a start closes what was open to others."""
    data, copy = tmp_path / "data", tmp_path / "copy"
    before = os.umask(0)
    try:
        for folder in (data, data / "blobs", data / "blobs" / "00"):
            folder.mkdir()
        with running_server(data, "--workers", "2") as server:
            assert upload(server.client(), "acme", "a").status_code == 201
            server.key("read", "acme")
            command = [*PREFIX_SERVICE, "backup", str(copy), "--data-dir", str(data)]
            subprocess.run(command, check=True, capture_output=True)
            found = {**modes(data), **{f"copy/{name}": mode for name, mode in modes(copy).items()}}
        with sqlite3.connect(data / "catalog.sqlite") as catalog:
            catalog.execute("CREATE TABLE journalled (x)")
            found |= modes(data)
        catalog.close()
    finally:
        os.umask(before)
    assert {
        "catalog.sqlite",
        "catalog.sqlite-journal",
        "key.secret",
        "lock",
        "bootstrap.key",
        "copy/catalog.sqlite",
    } <= {*found}
    places = {name for name in found if not (data / name).is_dir() and not (tmp_path / name).is_dir()}
    assert {name: oct(mode) for name, mode in found.items() if mode != (0o600 if name in places else 0o700)} == {}
