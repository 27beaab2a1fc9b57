"""Data folders of other releases, through the real `serve`: an older one is migrated, a newer one is refused."""

import contextlib
import hashlib
import json
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from tests.api.helpers import upload, weights
from tests.commands import run_command
from tests.conftest import running_server

DATA = Path(__file__).parents[1] / "data"
OLDER = DATA / "folder-0001"  # written by the release before quotas and the audit
WITH_AUDIT = DATA / "folder-0002"  # written by the release after that: tenants, keys, aliases, quotas, an audit


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
            used = own.get("/v1/tenants/acme/adapters?sort=-used").json()["items"]
            assert [(item["adapter"], item["used"]) for item in used] == [("summarize", 0 if numbers == [3] else 2)]
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
            described = "/v1/tenants/acme/adapters/summarize@1/card"
            assert own.get(described).text == ("" if numbers == [3] else "# Kept")
            assert own.put(described, content="# Kept", headers={"Content-Type": "text/markdown"}).status_code == 204
            base_model = "/v1/tenants/acme/adapters/summarize@1/base-model"
            assert own.get(base_model).json() == ({} if numbers == [3] else {"tokenizer": "kept"})
            assert own.put(base_model, json={"tokenizer": "kept"}).status_code == 204
            config = own.get("/v1/tenants/acme/adapters/summarize@1/config").content
            assert config == json.dumps(json.loads(config), indent=2, sort_keys=True).encode()
            tenant = own.get("/v1/tenants/acme").json()
            assert (tenant["adapters"], tenant["max_bytes"]) == (1, None)


def test_a_folder_with_quotas_keys_and_an_audit_stays_what_it_was(tmp_path: Path) -> None:
    """A later release serves the same bytes, entity tags, digests and ids, to the same keys, and deleted numbers stay
    used."""
    folder = Path(shutil.copytree(WITH_AUDIT, tmp_path / "data"))
    was: dict[str, Any] = json.loads((WITH_AUDIT / "told.json").read_text())
    manifests = _manifest_bytes(folder)
    with running_server(folder) as server:
        admin = server.client(was["bootstrap"])
        for reference, version in was["versions"].items():
            path = "/v1/tenants/{}/adapters/{}".format(*reference.split("/"))
            shown = admin.get(path).json()
            assert version["shown"].items() <= shown.items()
            assert shown["aliases"] == version["aliases"]
            prefix, parameters = admin.get(f"{path}/prefix"), admin.get(f"{path}/parameters")
            assert (prefix.headers["etag"], parameters.headers["etag"]) == (version["etag"], version["parameters_etag"])
            assert hashlib.sha256(prefix.content).hexdigest() == version["body"]
            assert hashlib.sha256(parameters.content).hexdigest() == version["parameters"]
        for alias, known in was["aliases"].items():
            found = admin.get(f"/v1/tenants/acme/adapters/summarize/aliases/{alias}").json()
            assert known.items() <= found.items()
        assert [_without_use(key) for key in admin.get("/v1/keys").json()["items"]] == [
            _without_use(key) for key in was["platform_keys"]
        ]
        for name, key in was["keys"].items():
            listed = server.client(key["key"]).get("/v1/tenants/acme/adapters").status_code
            revoked = name.endswith("revoked")
            assert listed == (401 if revoked else 404 if name.startswith("beta") else 200), name
        for tenant in was["tenants"]:
            # Manifests count since then.
            counted = tenant | {"bytes": tenant["bytes"] + manifests.get(tenant["tenant"], 0)}
            assert counted.items() <= admin.get(f"/v1/tenants/{tenant['tenant']}").json().items()
        # Ids of entries were numbers then, and keys had no names.
        entries = admin.get("/v1/audit").json()["items"]
        assert [_without_id(entry) for entry in entries] == [_without_id(entry) for entry in was["audit"]]
        assert {(entry["key_id"] == "command-line", entry["key_name"]) for entry in entries} == {
            (True, None),
            (False, "bootstrap"),
        }
        assert admin.get("/v1/tenants/gone").status_code == 404
        published = upload(admin, "acme", "summarize", file=weights(9)).json()
        assert published["version"] == 4


def _manifest_bytes(folder: Path) -> dict[str, int]:
    """The bytes of each tenant's manifests."""
    query = (
        "SELECT t.name, sum(length(CAST(v.manifest AS BLOB))) FROM versions v JOIN adapters a ON a.id = v.adapter_id "
        "JOIN tenants t ON t.id = a.tenant_id GROUP BY t.name"
    )
    with contextlib.closing(sqlite3.connect(folder / "catalog.sqlite")) as catalog:
        return dict(catalog.execute(query).fetchall())


def _without_use(key: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in key.items() if name != "last_used"}


def _without_id(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if name not in ("id", "key_name")}


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
