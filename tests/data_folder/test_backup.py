"""`data_folder.backup` copies a folder while clients publish, delete and collect, and a service starts on the copy."""

import itertools
import json
import shutil
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import datetime
from pathlib import Path

import httpx
import pytest

from prefix_service.catalog.audit import AuditLog
from prefix_service.catalog.changes import catalog_id, changes_after
from prefix_service.catalog.database import Database
from prefix_service.catalog.descriptions import Descriptions
from prefix_service.catalog.listings import Listings
from prefix_service.catalog.records import COMMAND_LINE, NewVersion, Use
from prefix_service.catalog.usage import UsageStore
from prefix_service.data_folder.backup import back_up
from prefix_service.data_folder.opening import catalog_file, keys_of, opened
from prefix_service.errors import Conflict, NotFound
from prefix_service.prefix.description import Description
from prefix_service.settings import Settings
from tests.api.helpers import accepted, upload, weights
from tests.catalog.conftest import HoldingCatalog
from tests.commands import run_command
from tests.conftest import Server, running_server


def prefix_of(client: httpx.Client, reference: str) -> httpx.Response:
    """Returns the answer to a request for the prefix of `tenant/adapter@…`."""
    tenant, name = reference.split("/")
    return client.get(f"/v1/tenants/{tenant}/adapters/{name}/prefix")


def publish(client: httpx.Client, adapter: str, seed: int) -> str:
    """Publishes a version, and returns its reference."""
    answer = accepted(lambda: upload(client, "acme", adapter, file=weights(seed)))
    assert answer.status_code in (200, 201), answer.text
    return f"acme/{adapter}@{answer.json()['version']}"


def test_a_backup_of_a_running_service_loses_nothing(tmp_path: Path) -> None:
    """A backup has every version that was acknowledged before it began, byte for byte, and working keys, although four
    clients publish and delete and garbage is collected with a grace period of one second.
    """
    target, stop = tmp_path / "backup", threading.Event()
    with running_server(tmp_path / "data", environment={"PREFIX_GARBAGE_GRACE": "1"}) as server:
        before = {publish(server.client(), f"before-{seed}", seed): seed for seed in range(20)}
        bodies = {reference: prefix_of(server.client(), reference).content for reference in before}

        def work(worker: int) -> None:
            client = server.client()
            for seed in itertools.count(1000 * worker):
                if stop.is_set():
                    return
                reference = publish(client, f"during-{worker}", seed)
                if seed % 2:
                    client.delete(f"/v1/tenants/acme/adapters/{reference.split('/')[1]}")

        with ThreadPoolExecutor(4) as pool:
            busy = [pool.submit(work, worker) for worker in range(1, 5)]
            done = run_command("backup", target, "--data-dir", server.data_dir, "--json")
            stop.set()
            for one in busy:
                one.result(60)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["lost"], told["blobs"] >= 40) == ([], True)
    assert not list(tmp_path.glob("*.partial"))
    with running_server(target) as restored:
        client = restored.client(server.admin_key)
        assert {reference: prefix_of(client, reference).content for reference in before} == bodies
        items = client.get("/v1/tenants/acme/adapters?limit=1000").json()["items"]
        for item in items:
            assert prefix_of(client, f"acme/{item['adapter']}").status_code == 200
            assert client.get(f"/v1/tenants/acme/adapters/{item['adapter']}/parameters").status_code == 200


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Returns the settings of a folder that was started once."""
    made = Settings(data_dir=tmp_path / "data")
    with opened(made):
        pass
    return made


def test_secrets_stay_private_and_the_first_key_stays_behind(settings: Settings, tmp_path: Path) -> None:
    """The copy is its owner's alone, has the keys' secret if the folder has it, and never the first key."""
    back_up(settings, tmp_path / "copy", lambda _: None)
    assert stat.S_IMODE((tmp_path / "copy").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "copy" / "key.secret").stat().st_mode) == 0o600
    assert not (tmp_path / "copy" / "bootstrap.key").exists()
    elsewhere = settings.model_copy(update={"key_secret_file": settings.secret_file})
    back_up(elsewhere, tmp_path / "second", lambda _: None)
    assert not (tmp_path / "second" / "key.secret").exists()


def test_what_stands_beside_versions_is_in_the_copy(settings: Settings, tmp_path: Path) -> None:
    """The copy has model cards, annotations, base models, config files, uses, and the names of keys in the audit."""
    digest = f"sha256:{'0' * 64}"
    new = NewVersion(digest, "{}", None, digest, 1, "float32", digest, 1)
    described = Description("card", {"run": "17"}, '{"tokenizer":"x"}', b'{ "peft_type": 1 }')
    hour = datetime(2026, 11, 26, 5)  # noqa: DTZ001 - as the catalog has it, in UTC
    with keys_of(settings) as (keyring, _), closing(Database(catalog_file(settings.data_dir))) as database:
        own = keyring.verify(keyring.create(None, "admin", "mine", COMMAND_LINE)[1])
        HoldingCatalog(database).add_version("acme", "a", new, own, description=described, make_tenant=True)
        UsageStore(database).add([Use(hour, "acme", "a", 1, own.key_id, requests=3)])
    back_up(settings, tmp_path / "copy", lambda _: None)
    with closing(Database(catalog_file(tmp_path / "copy"))) as copied:
        (item,) = Listings(copied).adapters("acme", after=None, limit=9, order="-used")
        assert Descriptions(copied).get(item.latest) == described
        assert item.used == 3
        assert {entry.key_name for entry in AuditLog(copied).listed("acme", before=None, limit=9)} == {"mine"}


def test_a_backup_is_the_same_catalog(settings: Settings, tmp_path: Path) -> None:
    """The copy has the id by which clients know the catalog, and the catalog's changes."""
    back_up(settings, tmp_path / "copy", lambda _: None)
    found = []
    for folder in (settings.data_dir, tmp_path / "copy"):
        database = Database(catalog_file(folder))
        with database.reading() as connection:
            found.append((catalog_id(connection), changes_after(connection, 0, 9)))
        database.close()
    assert found[0] == found[1]
    assert found[0][1][0] == 1


def test_a_backup_overwrites_nothing(settings: Settings, tmp_path: Path) -> None:
    """A backup refuses a target that exists, and replaces what an interrupted backup left."""
    (tmp_path / "copy.partial").mkdir()
    (tmp_path / "copy.partial" / "half").touch()
    back_up(settings, tmp_path / "copy", lambda _: None)
    assert not (tmp_path / "copy" / "half").exists()
    with pytest.raises(Conflict, match="copy exists"):
        back_up(settings, tmp_path / "copy", lambda _: None)


def test_a_folder_without_a_catalog(tmp_path: Path) -> None:
    """A backup of a mistyped folder raises NotFound and creates nothing."""
    with pytest.raises(NotFound, match="is not a data folder"):
        back_up(Settings(data_dir=tmp_path / "none"), tmp_path / "copy", lambda _: None)
    assert list(tmp_path.iterdir()) == []


def test_damage_is_told(server: Server, tmp_path: Path) -> None:
    """`backup` names a lost or rotten blob, copies the rest, and exits with status 1."""
    data_dir = tmp_path / "data"
    with running_server(data_dir) as running:
        publish(running.client(), "a", 1)
        detail = running.client().get("/v1/tenants/acme/adapters/a").json()
        publish(running.client(), "b", 2)
    name = detail["weights"].removeprefix("sha256:")
    (data_dir / "blobs" / name[:2] / name).write_bytes(b"rotten")
    done = run_command("backup", tmp_path / "copy", "--data-dir", data_dir, "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["lost"] == [detail["weights"]]
    shown = run_command("backup", tmp_path / "again", "--data-dir", data_dir)
    assert (shown.returncode, detail["weights"] in shown.stdout) == (1, True)
    shutil.rmtree(tmp_path / "copy")
