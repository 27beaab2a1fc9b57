"""`/v1/whoami` describes a key, and PUT gives a key an end: together they make a rotation."""

import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from prefix_service.settings import Settings
from tests.api.helpers import problem
from tests.conftest import Server, running_server
from tests.processes import eventually

TENANT = "keyed"
OWNERS = {TENANT: f"/v1/tenants/{TENANT}/keys", None: "/v1/keys"}


@pytest.fixture(autouse=True)
def keyed(admin: httpx.Client) -> None:
    """Makes a tenant for every test."""
    admin.put(f"/v1/tenants/{TENANT}")


@pytest.fixture(params=[TENANT, None], ids=["tenant", "platform"])
def path(request: pytest.FixtureRequest) -> str:
    """Returns the path of an owner's keys."""
    return OWNERS[request.param]


def made(admin: httpx.Client, path: str, **wanted: Any) -> dict[str, Any]:
    """Returns a new key."""
    answer = admin.post(path, json={"scope": "read", **wanted})
    assert answer.status_code == 201, answer.text
    key: dict[str, Any] = answer.json()
    return key


def ahead(**distance: float) -> str:
    """Returns a moment in the future, as the API writes it."""
    return (datetime.now(UTC) + timedelta(**distance)).isoformat().replace("+00:00", "Z")


def ended_soon(admin: httpx.Client, key: str) -> datetime:
    """Gives a key an end in two seconds, or later if that is over before a slow machine has said it; returns it."""
    for seconds in (2, 30):
        end = datetime.now(UTC) + timedelta(seconds=seconds)
        answer = admin.put(key, json={"expires": end.isoformat()})
        if answer.status_code == 200 or datetime.now(UTC) < end:
            break
    assert answer.status_code == 200, answer.text
    return end


@pytest.mark.parametrize("scope", ["metrics", "read", "write", "admin"])
@pytest.mark.parametrize("owner", OWNERS)
@pytest.mark.parametrize("ends", [True, False])
def test_a_key_says_what_it_is(server: Server, admin: httpx.Client, owner: str | None, scope: str, ends: bool) -> None:
    """whoami describes a key of any scope, and shows nothing of its secret; `metrics` is the platform's alone."""
    if owner is not None and scope == "metrics":
        problem(admin.post(OWNERS[owner], json={"scope": scope}), 422, "invalid-request")
        return
    key = made(admin, OWNERS[owner], scope=scope, name="ci", expires=ahead(days=1) if ends else None)
    answer = server.client(key["key"]).get("/v1/whoami")
    assert answer.status_code == 200
    expected = {"id": key["id"], "name": "ci", "tenant": owner, "scope": scope, "expires": key["expires"]}
    assert answer.json() == expected | {"max_upload_bytes": Settings().max_upload_bytes}


def test_dev_mode_is_a_platform_admin(tmp_path: Path) -> None:
    """In dev mode there is no key, and every caller is a platform admin."""
    with running_server(tmp_path / "data", "--dev") as dev:
        assert dev.client("").get("/v1/whoami").json() == {
            "id": "dev",
            "name": "",
            "tenant": None,
            "scope": "admin",
            "expires": None,
            "max_upload_bytes": Settings().max_upload_bytes,
        }


def test_an_end_is_given_and_moves_to_an_earlier_moment(admin: httpx.Client, path: str) -> None:
    """An end moves to an earlier moment and never to a later one; setting it again changes nothing."""
    key = made(admin, path)
    one = f"{path}/{key['id']}"
    week, day = ahead(weeks=1), ahead(days=1)
    for end in (week, week, day):
        answer = admin.put(one, json={"expires": end})
        assert answer.status_code == 200
        assert answer.json() == admin.get(one).json() == {**admin.get(one).json(), "id": key["id"], "expires": end}
    told = problem(admin.put(one, json={"expires": week}), 409, "conflict")
    assert day in told["detail"]
    assert admin.get(one).json()["expires"] == day


def test_a_key_ends_when_it_was_said_to(server: Server, admin: httpx.Client, path: str) -> None:
    """A key that this process has verified before is refused after its end."""
    key = made(admin, path)
    client = server.client(key["key"])
    assert client.get("/v1/whoami").status_code == 200
    end = ended_soon(admin, f"{path}/{key['id']}")
    assert client.get("/v1/whoami").status_code == 200 or datetime.now(UTC) > end
    time.sleep(max((end - datetime.now(UTC)).total_seconds(), 0) + 0.01)
    problem(client.get("/v1/whoami"), 401, "unauthenticated")
    problem(admin.put(f"{path}/{key['id']}", json={"expires": ahead(days=1)}), 409, "conflict")


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"expires": None},
        {"expires": "soon"},
        {"expires": 4102444800},
        {"expires": "2001-01-01T00:00:00Z"},
        {"expires": "0001-01-01T00:00:00+14:00"},
        {"expires": "2999-01-01T00:00:00Z", "scope": "admin"},
    ],
    ids=str,
)
def test_what_is_no_end(admin: httpx.Client, path: str, body: dict[str, Any]) -> None:
    """An end that is empty, in the past or no moment is refused, and so are additional fields."""
    key = made(admin, path, expires="2999-12-31T00:00:00Z")
    problem(admin.put(f"{path}/{key['id']}", json=body), 422, "invalid-request")
    assert admin.get(f"{path}/{key['id']}").json()["expires"] == "2999-12-31T00:00:00Z"


def test_a_name_with_a_control_character_is_refused(admin: httpx.Client, path: str) -> None:
    """The error says which, on either catalog."""
    told = problem(admin.post(path, json={"scope": "read", "name": "a\0b"}), 422, "invalid-request")
    assert "character 1 is U+0000" in told["detail"]


def test_the_past_is_told_with_the_time_of_the_service(admin: httpx.Client, path: str) -> None:
    """The error has the service's time, so that a wrong clock is found."""
    key = made(admin, path)
    told = problem(admin.put(f"{path}/{key['id']}", json={"expires": "2001-01-01"}), 422, "invalid-request")
    assert "2001-01-01T00:00:00Z is in the past, it is 2" in told["detail"]


def test_whose_key_it_is_not(server: Server, admin: httpx.Client) -> None:
    """A key is reached only through its owner; through others it is missing."""
    keys = {owner: made(admin, path) for owner, path in OWNERS.items()}
    end = {"expires": ahead(days=1)}
    missing = problem(admin.put(f"{OWNERS[TENANT]}/{'0' * 16}", json=end), 404, "not-found")
    foreign = problem(admin.put(f"{OWNERS[TENANT]}/{keys[None]['id']}", json=end), 404, "not-found")
    assert foreign["detail"].replace(keys[None]["id"], "0" * 16) == missing["detail"]
    problem(admin.put(f"/v1/keys/{keys[TENANT]['id']}", json=end), 404, "not-found")
    problem(admin.put(f"/v1/tenants/keyed-none/keys/{keys[TENANT]['id']}", json=end), 404, "not-found")
    for owner, path in OWNERS.items():
        assert admin.get(f"{path}/{keys[owner]['id']}").json()["expires"] is None


def test_a_rotation_is_audited(admin: httpx.Client) -> None:
    """The audit has who gave which key which end, and nothing for a repeated request."""
    key = made(admin, OWNERS[TENANT])
    end = ahead(days=1)
    for _ in range(2):
        admin.put(f"{OWNERS[TENANT]}/{key['id']}", json={"expires": end})
    latest = admin.get(f"/v1/tenants/{TENANT}/audit", params={"limit": 2}).json()["items"]
    assert [(entry["action"], entry["target"]) for entry in latest] == [
        ("key.changed", key["id"]),
        ("key.created", key["id"]),
    ]
    assert latest[0]["details"] == {"expires": end}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Yields a service of two processes."""
    with running_server(tmp_path_factory.mktemp("two") / "data", "--workers", "2") as running:
        yield running


def test_every_process_hears_of_an_end(two: Server) -> None:
    """Both processes refuse a key after the end that one of them was given."""
    admin = two.client()
    key = made(admin, "/v1/keys")
    reader = two.client(key["key"])

    def statuses() -> set[int]:
        # Each request has a new connection, so that both processes are asked.
        return {reader.get("/v1/whoami", headers={"Connection": "close"}).status_code for _ in range(20)}

    assert statuses() == {200}
    end = ended_soon(admin, f"/v1/keys/{key['id']}")
    eventually(lambda: datetime.now(UTC) > end and statuses() == {401})
