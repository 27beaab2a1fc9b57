"""`prefix-service migrate`: from a data folder in use to PostgreSQL and S3, killed on its way, and back."""

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from prefix_service.blobs.names import path_of
from prefix_service.catalog.database import Database
from prefix_service.catalog.records import COMMAND_LINE
from prefix_service.catalog.tenants import Tenants
from prefix_service.data_folder import moving as flow
from prefix_service.data_folder.opening import blob_folder, catalog_file, opened
from prefix_service.errors import Conflict
from prefix_service.settings import Settings
from tests.commands import Finished, run_command
from tests.conftest import running_server
from tests.fleet import moving
from tests.postgresql import PostgreSQL
from tests.seaweedfs import SeaweedFS

PASSWORD = "hunter2"  # noqa: S105 - it must not be found


@pytest.fixture(scope="module")
def moved(
    postgresql: PostgreSQL, seaweedfs: SeaweedFS, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[moving.Ground, list[str], list[str]]]:
    """Yields where a folder in use moved from and to, what differs, and what was said of it."""
    ground = moving.Ground(tmp_path_factory.mktemp("moved"), postgresql, seaweedfs, "short")
    said: list[str] = []
    yield ground, moving.campaign(ground, 60, said.append), said
    postgresql.drop(ground.database)


def test_a_folder_in_use_moves_and_comes_back(moved: tuple[moving.Ground, list[str], list[str]]) -> None:
    """Under traffic, killed among the blobs and among the rows, again, at last read-only, and back to a folder: no row,
    no blob and no answer differs. `python -m tests.fleet.moving` is the long form."""
    _, differences, said = moved
    assert not differences, "\n".join([*said, *differences])


def test_a_target_in_use(moved: tuple[moving.Ground, list[str], list[str]]) -> None:
    """A fleet that has changes of its own is left alone, and so is a folder that is served, with the keys it had."""
    ground, *_ = moved
    with closing(Database(ground.catalog_url)) as database:
        Tenants(database).put("of-the-fleet", COMMAND_LINE)
    again = migrate(*ground.options, environment=ground.seaweedfs.environment)
    assert (again.returncode, "a service has run on it" in again.stderr) == (1, True), again.stderr
    back = ground.folder / "back"
    with running_server(back) as server:  # with the keys that it had
        first = (ground.data_dir / "bootstrap.key").read_text().strip()
        assert server.client(first).get("/v1/whoami").json()["scope"] == "admin"
        busy = migrate("--to-data-dir", back, environment=ground.fleet)
        assert (busy.returncode, "stop it first" in busy.stderr) == (1, True)


def migrate(*options: str | Path, environment: dict[str, str] | None = None) -> Finished:
    return run_command("migrate", *options, environment=environment)


@pytest.fixture
def data_dir(tmp_path: Path) -> Iterator[Path]:
    """A data folder with a key and a blob that no version names."""
    with opened(Settings(data_dir=tmp_path / "data")):
        yield tmp_path / "data"


def test_a_folder_is_copied_to_a_folder(data_dir: Path, tmp_path: Path) -> None:
    """With the secret, without the first key's file; a second run has nothing to do."""
    first = migrate("--data-dir", data_dir, "--to-data-dir", tmp_path / "copy", "--json")
    assert first.returncode == 0, first.stderr
    assert json.loads(first.stdout)["rows"]["added"] > 0
    again = migrate("--data-dir", data_dir, "--to-data-dir", tmp_path / "copy", "--json")
    assert json.loads(again.stdout)["rows"] == {"added": 0, "changed": 0, "removed": 0}
    copied = {path.name for path in (tmp_path / "copy").iterdir()}
    assert {"catalog.sqlite", "key.secret", "blobs"} <= copied
    assert "bootstrap.key" not in copied


def test_two_runs_at_a_time(data_dir: Path, postgresql: PostgreSQL, tmp_path: Path) -> None:
    """The second is refused, and so is one from a catalog to itself."""
    name = postgresql.new_database()
    options = ("--to-catalog", postgresql.url(name), "--to-data-dir", tmp_path / "blobs-of-the-fleet")
    assert migrate("--data-dir", data_dir, *options).returncode == 0
    with closing(Database(postgresql.url(name))) as database, database.alone(flow._LOCK):
        second = migrate("--data-dir", data_dir, *options)
    assert (second.returncode, "another `migrate` is at work" in second.stderr) == (1, True)
    own = {"PREFIX_CATALOG_URL": postgresql.url(name), "PREFIX_KEY_SECRET_FILE": str(data_dir / "key.secret")}
    own["PREFIX_DATA_DIR"] = str(tmp_path / "blobs-of-the-fleet")
    itself = migrate("--to-catalog", postgresql.url(name), "--to-data-dir", tmp_path / "others", environment=own)
    assert (itself.returncode, "source and target in one" in itself.stderr) == (1, True), itself.stderr
    postgresql.drop(name)


def test_a_target_that_belongs_to_others(data_dir: Path, tmp_path: Path) -> None:
    """The folder of another service is left alone, and so is the folder itself."""
    with opened(Settings(data_dir=tmp_path / "other")):
        pass
    kept = catalog_file(tmp_path / "other").read_bytes()
    for folder, reason in ((tmp_path / "other", "is another secret"), (data_dir, "is the data folder that is moved")):
        done = migrate("--data-dir", data_dir, "--to-data-dir", folder)
        assert (done.returncode, reason in done.stderr) == (1, True), done.stderr
    assert catalog_file(tmp_path / "other").read_bytes() == kept


def test_a_folder_that_is_not_complete(data_dir: Path, tmp_path: Path) -> None:
    """No service starts on it, not even one that only reads, until another run has completed it."""
    source, target = Settings(data_dir=data_dir), Settings(data_dir=tmp_path / "half")

    def fail(what: str, _at: int, _total: int) -> None:
        if what == "rows":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        flow.move(source, target, fail)
    for settings in (target, target.model_copy(update={"read_only": True})):
        with pytest.raises(Conflict, match="has not come to its end"), opened(settings):
            pass
    flow.move(source, target, lambda *_: None)
    with opened(target):
        pass


def test_lost_blobs_are_named(moved: tuple[moving.Ground, list[str], list[str]], tmp_path: Path) -> None:
    """The rest is copied; what is lost or damaged is named, and the exit status is 1."""
    back = moved[0].folder / "back"
    named = moving.named(catalog_file(back))
    damaged, lost, *_ = (blob_folder(back) / path_of(digest) for digest in sorted(named))
    damaged.write_bytes(b"damaged")
    lost.unlink()
    done = migrate("--data-dir", back, "--to-data-dir", tmp_path / "copy", "--json")
    assert done.returncode == 1
    told = json.loads(done.stdout)
    assert told["lost"] == sorted(f"sha256:{path.name}" for path in (damaged, lost))
    assert told["blobs"] == len(named) - 2
    assert damaged.exists(), "the source is not changed"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ((), "say where to copy to: --to-catalog and --to-blobs, or --to-data-dir"),
        (("--to-catalog", "postgresql+psycopg:///db"), "say where to copy to: --to-blobs"),
        (("--to-blobs", "s3://bucket"), "say where to copy to: --to-catalog"),
        (
            ("--to-catalog", f"postgresql://u:{PASSWORD}@h/db", "--to-blobs", "s3://bucket"),
            "--to-catalog: begin it with",
        ),
        (("--to-catalog", "postgresql+psycopg:///db", "--to-blobs", "s3:/bucket"), "--to-blobs: a place for blobs"),
        (
            ("--to-catalog", "postgresql+psycopg:///db", "--to-blobs", "s3://bucket", "--to-data-dir", "copy"),
            "leave --to-data-dir out",
        ),
    ],
)
def test_options_that_say_too_little_or_too_much(data_dir: Path, options: tuple[str, ...], reason: str) -> None:
    """The error says which option is meant, and shows no password."""
    done = migrate("--data-dir", data_dir, *options)
    assert (done.returncode, reason in done.stderr) == (1, True), done.stderr
    assert PASSWORD not in done.stderr


def test_what_is_no_data_folder(tmp_path: Path) -> None:
    """There is nothing to move, and nothing is made."""
    done = migrate("--data-dir", tmp_path / "absent", "--to-data-dir", tmp_path / "copy")
    assert (done.returncode, "is not a data folder" in done.stderr) == (1, True)
    assert list(tmp_path.iterdir()) == []
