"""`key` and `whoami` work on a running service, and with `--data-dir` on the folder of a stopped one."""

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from prefix_service.cli.commands.key import rotate
from prefix_service.data_folder.opening import opened
from prefix_service.errors import StorageFailed
from prefix_service.settings import Settings
from tests.cli.conftest import Run
from tests.commands import Finished, run_command
from tests.conftest import Server

FIELDS = {"id", "tenant", "scope", "name", "created", "expires", "last_used"}
Keys = Callable[..., Finished]
"""Runs `prefix-service key …`."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Returns the data folder of a service that was started and stopped."""
    settings = Settings(data_dir=tmp_path / "data")
    with opened(settings):
        return settings.data_dir


@pytest.fixture(params=["service", "folder"])
def keys(request: pytest.FixtureRequest) -> Keys:
    """Returns `key`, run on a service and on a folder."""
    if request.param == "service":
        run: Run = request.getfixturevalue("run")
        return lambda *arguments: run("key", *arguments)
    data_dir: Path = request.getfixturevalue("folder")
    return lambda *arguments: run_command("key", *arguments, "--data-dir", data_dir)


def told(keys: Keys, *arguments: str) -> Any:
    """Returns what a command prints for a script."""
    done = keys(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def moment(text: str) -> datetime:
    return datetime.fromisoformat(text)


def is_about(text: str, **distance: float) -> bool:
    """Returns whether a moment is so far from now, within two minutes."""
    return abs(moment(text) - datetime.now(UTC) - timedelta(**distance)) < timedelta(minutes=2)


def test_keys_are_made_listed_and_revoked(keys: Keys) -> None:
    """`key` prints a new key once, and says that it made a tenant."""
    made = keys("create", "--tenant", "keys-acme", "--scope", "write", "--name", "ci", "--json")
    assert made.stderr == "made tenant keys-acme\n"
    key = json.loads(made.stdout)
    assert key.keys() == FIELDS | {"key"}
    assert key["key"].startswith("pfx_")
    again = keys("create", "--tenant", "keys-acme", "--scope", "read")
    assert (again.stderr, again.stdout[:4], again.stdout.count("\n")) == ("", "pfx_", 1)
    listed = told(keys, "list", "--tenant", "keys-acme")["items"]
    assert {(item["scope"], item["name"]) for item in listed} == {("write", "ci"), ("read", "")}
    assert all(item.keys() == FIELDS for item in listed)
    shown = keys("list", "--tenant", "keys-acme").stdout
    assert "Keys of tenant keys-acme" in shown
    assert key["id"] in shown
    for item in listed:
        assert keys("revoke", item["id"], "--tenant", "keys-acme").stdout == f"revoked key {item['id']}\n"
    missing = keys("revoke", key["id"], "--tenant", "keys-acme")
    assert missing.returncode == 1
    assert f"tenant 'keys-acme' has no key '{key['id']}'" in missing.stderr
    assert told(keys, "list", "--tenant", "keys-acme") == {"items": []}


def test_a_key_belongs_to_a_tenant_or_to_the_platform(keys: Keys) -> None:
    """`create` needs an owner; other commands without one are about the owner of the key that asks."""
    refused = keys("create", "--scope", "read")
    assert refused.returncode == 1
    assert "say whose key it is" in refused.stderr
    for command in (("create", "--scope", "read"), ("list",), ("revoke", "0" * 16), ("rotate", "0" * 16)):
        both = keys(*command, "--platform", "--tenant", "a")
        assert both.returncode == 1
        assert "not both" in both.stderr
    assert keys("create", "--platform", "--scope", "root").returncode == 2
    key = told(keys, "create", "--platform", "--scope", "metrics", "--name", "prometheus")
    assert (key["tenant"], key["scope"]) == (None, "metrics")
    assert key["id"] in [item["id"] for item in told(keys, "list")["items"]]
    assert "Keys of the platform" in keys("list").stdout
    assert keys("revoke", key["id"]).returncode == 0
    of_tenant = keys("create", "--tenant", "a", "--scope", "metrics")
    assert of_tenant.returncode == 1
    assert "error (invalid-request)" in of_tenant.stderr


def test_a_key_ends_when_it_was_said_to(keys: Keys) -> None:
    """`--expires` takes a duration, a date or a moment in any zone; a past one is refused and makes no tenant."""
    for text, expected in (
        ("2999-01-31", "2999-01-31T00:00:00Z"),
        ("2999-01-31T12:00:00+02:00", "2999-01-31T10:00:00Z"),
    ):
        assert told(keys, "create", "--platform", "--scope", "read", "--expires", text)["expires"] == expected
    assert is_about(told(keys, "create", "--platform", "--scope", "read", "--expires", "90d")["expires"], days=90)
    for text, words in (("2001-01-31", "is in the past"), ("soon", "is no moment"), ("0d", "is no moment")):
        refused = keys("create", "--tenant", "keys-never", "--scope", "read", "--expires", text)
        assert refused.returncode == 1
        assert refused.stderr.startswith("error (invalid-input)")
        assert words in refused.stderr
    assert "there is no tenant 'keys-never'" in keys("list", "--tenant", "keys-never").stderr


@pytest.mark.parametrize("owner", [("--platform",), ("--tenant", "keys-rotating"), ()])
def test_a_rotation_is_a_second_key_and_an_end_for_the_first(keys: Keys, owner: tuple[str, ...]) -> None:
    """`rotate` makes a second key of the same owner, scope and name, and gives the first an end."""
    first = told(keys, "create", "--scope", "write", "--name", "fleet", *(owner or ("--platform",)))
    rotated = keys("rotate", first["id"], "--overlap", "2d", *owner)
    assert rotated.returncode == 0, rotated.stderr
    (text,) = rotated.stdout.splitlines()
    second = next(item for item in told(keys, "list", *owner)["items"] if item["id"] == text.split("_")[1])
    assert {name: second[name] for name in ("tenant", "scope", "name", "expires")} == {
        name: first[name] for name in ("tenant", "scope", "name", "expires")
    }
    ended = next(item for item in told(keys, "list", *owner)["items"] if item["id"] == first["id"])
    assert moment(ended["expires"]) - moment(second["created"]) == timedelta(days=2)
    end = ended["expires"].removesuffix("Z").replace("T", " ")
    assert rotated.stderr == (
        f"the first key, {first['id']}, ends {end} UTC\n"
        f"the second key, {second['id']}, ends never; keep it, it is shown once:\n"
    )


def test_a_rotation_for_a_script(keys: Keys) -> None:
    """`rotate --json` shows the second key as `create` does, and the first next to it; a week is the default."""
    first = told(keys, "create", "--platform", "--scope", "read")
    second = told(keys, "rotate", first["id"])
    assert second.keys() == FIELDS | {"key", "first"}
    assert second["first"]["id"] == first["id"] != second["id"]
    assert is_about(second["first"]["expires"], days=7)


def test_a_rotated_key_that_ends_lives_as_long(keys: Keys) -> None:
    """The first key keeps an end before the overlap's, and the second has its lifetime, or the given end."""
    first = told(keys, "create", "--platform", "--scope", "read", "--expires", "5d")
    second = told(keys, "rotate", first["id"], "--overlap", "7d")
    assert second["first"]["expires"] == first["expires"]
    assert is_about(second["expires"], days=5)
    third = told(keys, "rotate", second["id"], "--overlap", "1d", "--expires", "30d")
    assert is_about(third["first"]["expires"], days=1)
    assert is_about(third["expires"], days=30)


@pytest.mark.parametrize("overlap", ["0d", "7", "-1d", "soon", ""])
def test_what_is_no_overlap(keys: Keys, overlap: str) -> None:
    """`rotate` refuses a malformed overlap before it makes a key."""
    first = told(keys, "create", "--platform", "--scope", "read")
    before = told(keys, "list", "--platform")
    refused = keys("rotate", first["id"], f"--overlap={overlap}")
    assert refused.returncode == 1
    assert "is not a duration" in refused.stderr
    assert told(keys, "list", "--platform") == before


def test_a_key_that_is_missing_is_not_rotated(keys: Keys) -> None:
    """`rotate` makes no second key for a key that does not exist."""
    before = told(keys, "list", "--platform")
    missing = keys("rotate", "f" * 16)
    assert missing.returncode == 1
    assert "the platform has no key 'ffffffffffffffff'; to reach a tenant's key, name the tenant" in missing.stderr
    assert len(told(keys, "list", "--platform")["items"]) == len(before["items"])


class Failing:
    """Keys of which none can be given an end."""

    def __init__(self) -> None:
        self.ids = ["first"]

    def own(self) -> str | None:
        """Returns None, for the platform."""
        return None

    def create(self, owner: str | None, scope: str, name: str, expires: datetime | None) -> dict[str, Any]:
        """Returns another key."""
        self.ids.append("second")
        return {**self.get(owner, "second"), "key": "pfx_second"}

    def listed(self, owner: str | None) -> list[dict[str, Any]]:
        """Returns all keys."""
        return [self.get(owner, key_id) for key_id in self.ids]

    def get(self, _owner: str | None, key_id: str) -> dict[str, Any]:
        """Returns a key without an end."""
        return {"id": key_id, "scope": "read", "name": "", "created": "2026-01-01T00:00:00Z", "expires": None}

    def shorten(self, _owner: str | None, key_id: str, _expires: datetime) -> dict[str, Any]:
        """Raises what a broken disk raises."""
        raise StorageFailed(f"the disk refuses an end for {key_id}")

    def revoke(self, _owner: str | None, key_id: str) -> None:
        """Forgets the key."""
        self.ids.remove(key_id)


def test_a_rotation_that_fails_leaves_no_key(capsys: pytest.CaptureFixture[str]) -> None:
    """If the first key cannot be given an end, `rotate` revokes the second again, and says so."""
    keys = Failing()
    with pytest.raises(StorageFailed, match="the disk refuses an end for first"):
        rotate(keys, None, "first", timedelta(days=1), None)
    assert keys.ids == ["first"]
    assert "the first key is as it was, so the second, second, is revoked again" in capsys.readouterr().err


def test_a_service_is_asked_with_the_key_that_is_used(server: Server, run: Run) -> None:
    """A tenant's admin lists and makes its own keys without naming its tenant, and no others."""
    text = json.loads(run("key", "create", "--tenant", "keys-own", "--scope", "admin", "--json").stdout)["key"]
    own = {"PREFIX_URL": server.url, "PREFIX_API_KEY": text}
    listed = run_command("key", "list", environment=own)
    assert "Keys of tenant keys-own" in listed.stdout
    (item,) = json.loads(run_command("key", "list", "--json", environment=own).stdout)["items"]
    rotated = run_command("key", "rotate", item["id"], "--json", environment=own)
    assert json.loads(rotated.stdout)["tenant"] == "keys-own"
    for other in ("keys-other", "keys-nobody"):
        refused = run_command("key", "create", "--tenant", other, "--scope", "read", environment=own)
        assert refused.returncode == 1
        assert f"there is no tenant '{other}'" in refused.stderr
    assert "error (forbidden)" in run_command("key", "list", "--platform", environment=own).stderr
    nobody = run_command("key", "list", environment={"PREFIX_URL": server.url, "PREFIX_API_KEY": ""})
    assert "error (unauthenticated)" in nobody.stderr


def test_whoami(server: Server, run: Run) -> None:
    """`whoami` shows the key that is used, for people and for scripts."""
    made = json.loads(
        run("key", "create", "--platform", "--scope", "metrics", "--name", "me", "--expires", "9d", "--json").stdout
    )
    mine = {"PREFIX_URL": server.url, "PREFIX_API_KEY": made["key"]}
    found = json.loads(run_command("whoami", "--json", environment=mine).stdout)
    own = {name: made[name] for name in ("id", "name", "tenant", "scope", "expires")}
    assert found == own | {"max_upload_bytes": 2 << 30}
    shown = run_command("whoami", environment=mine).stdout
    for words in (made["id"], "me", "the platform", "metrics", f"{made['expires'][:10]}"):
        assert words in shown
    shown = run("whoami").stdout
    assert "bootstrap" in shown
    assert "never" in shown


@pytest.mark.parametrize("command", [("create", "--platform", "--scope", "read"), ("list",), ("revoke", "0" * 16)])
def test_a_folder_is_worked_on_and_never_made(tmp_path: Path, command: tuple[str, ...]) -> None:
    """`key --data-dir` refuses a folder that is new or no service's, and creates nothing."""
    new, empty = tmp_path / "new", tmp_path / "empty"
    empty.mkdir()
    for folder in (new, empty):
        refused = run_command("key", *command, "--data-dir", folder)
        assert refused.returncode == 1
        assert f"{folder} is not a data folder of a service" in refused.stderr
    assert list(tmp_path.iterdir()) == [empty]
    assert list(empty.iterdir()) == []
    before = sorted(Path().iterdir())
    away = run_command("key", *command, environment={"PREFIX_URL": "http://127.0.0.1:1", "PREFIX_DATA_DIR": str(new)})
    assert "error (connection-failed)" in away.stderr
    assert (sorted(Path().iterdir()), list(tmp_path.iterdir())) == (before, [empty])


def test_a_folder_remembers_a_hash_alone(folder: Path) -> None:
    """No file of the folder has a key's text."""
    made = json.loads(
        run_command("key", "create", "--platform", "--scope", "read", "--data-dir", folder, "--json").stdout
    )
    assert not any(made["key"].encode() in path.read_bytes() for path in folder.iterdir() if path.is_file())


def test_a_key_made_in_the_folder_of_a_running_service_works_immediately(server: Server) -> None:
    """A running service accepts a key that the command line has just made in its folder."""
    assert server.client(server.key("read")).get("/v1/tenants").status_code == 403
    assert server.client(server.key("admin")).get("/v1/tenants").status_code == 200
