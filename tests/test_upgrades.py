"""Data folders of other releases, through the real `serve`: an older one is migrated, a newer one is refused."""

import contextlib
import json
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from tests.api.helpers import upload, weights
from tests.cli.conftest import run_command
from tests.conftest import running_server

OLDER = Path(__file__).parent / "data" / "folder-0001"  # written by the release before quotas and the audit


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the older folder."""
    return Path(shutil.copytree(OLDER, tmp_path / "data"))


@pytest.fixture
def told() -> dict[str, Any]:
    """What the older release said of it."""
    found: dict[str, Any] = json.loads((OLDER / "told.json").read_text())
    return found


def test_an_older_folder_is_migrated(folder: Path, told: dict[str, Any]) -> None:
    """Versions, their bytes, aliases, numbers and keys stay; what is new works with what is old; and again."""
    for numbers in ([3], [3, 4]):
        with running_server(folder) as server:
            own = server.client(told["key"])
            for reference, version in told["versions"].items():
                tenant, name = reference.split("/")
                client = own if tenant == "acme" else server.client(_admin(folder))
                answer = client.get(f"/v1/tenants/{tenant}/adapters/{name}/prefix")
                assert (answer.status_code, answer.headers["prefix-digest"]) == (200, version["digest"])
                seed = 1 if name.endswith("@2") else 0
                parameters = client.get(f"/v1/tenants/{tenant}/adapters/{name}/parameters")
                assert parameters.content == weights(seed)
            assert own.get("/v1/tenants/acme/adapters/summarize@prod").json()["version"] == 1
            published = upload(own, "acme", "summarize", file=weights(100 + numbers[-1])).json()
            assert published["version"] == numbers[-1]
            tenant = own.get("/v1/tenants/acme").json()
            assert (tenant["adapters"], tenant["max_bytes"]) == (1, None)


def _admin(folder: Path) -> str:
    made = run_command("key", "create", "--platform", "--scope", "admin", "--data-dir", folder, "--json")
    key: str = json.loads(made.stdout)["key"]
    return key


def test_a_newer_folder_is_refused(folder: Path) -> None:
    """With words that say what to do, and nothing in it changes."""
    with contextlib.closing(sqlite3.connect(folder / "catalog.sqlite")) as catalog, catalog:
        catalog.execute("UPDATE alembic_version SET version_num = '9999'")
    before = (folder / "catalog.sqlite").read_bytes()
    for command in (["serve"], ["key", "list", "--platform"]):
        refused = run_command(*command, "--data-dir", folder)
        assert refused.returncode == 1
        assert "was written by a newer prefix-service (schema 9999): run that version" in refused.stderr
        assert "Traceback" not in refused.stderr
    assert (folder / "catalog.sqlite").read_bytes() == before
