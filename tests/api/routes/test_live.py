"""Live numbers over HTTP: of all workers, of a tenant; streams that end with their key, and with the service."""

import json
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from tests.api.helpers import problem, upload
from tests.conftest import Server, running_server

STREAM = {"Accept": "text/event-stream"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two workers, one tenant with an adapter, and room for eight streams in each."""
    data, room = tmp_path_factory.mktemp("live") / "data", {"PREFIX_MAX_WATCHERS": "8"}
    with running_server(data, "--workers", "2", environment=room) as running:
        assert upload(running.client(), "acme", "a").status_code == 201
        assert running.client().put("/v1/tenants/beta").status_code == 201
        yield running


def _until(client: httpx.Client, path: str, holds: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    """The document, once something holds of it."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        found: dict[str, Any] = client.get(path).json()
        if holds(found):
            return found
        time.sleep(0.2)
    raise AssertionError(found)


def _missing(found: dict[str, Any]) -> int:
    return sum(found["problems"].get("not-found", []))


def _events(answer: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in answer.iter_lines():
        if line.startswith("data: "):
            yield json.loads(line.removeprefix("data: "))


def _ends(events: Iterator[object]) -> None:
    """Assert that a stream ends; it would go on for ever."""
    until = time.monotonic() + 60
    for _ in events:
        assert time.monotonic() < until


def _new_key(server: Server, tenant: str | None) -> dict[str, Any]:
    path = "/v1/keys" if tenant is None else f"/v1/tenants/{tenant}/keys"
    made: dict[str, Any] = server.client().post(path, json={"scope": "read"}).json()
    return made


def test_numbers_of_all_workers(server: Server) -> None:
    """Requests that different workers answered are in one document; a tenant's has its own alone."""
    for tenant in ("acme", "beta"):  # its numbers begin with the first slot that begins after it came into being
        _until(server.client(), f"/v1/tenants/{tenant}/live", lambda found: found["at"])
    for _ in range(20):
        answer = httpx.get(
            f"{server.url}/v1/tenants/acme/adapters/a/prefix", headers={"Authorization": f"Bearer {server.admin_key}"}
        )
        assert answer.status_code == 200
        missing = server.client().get("/v1/tenants/beta/adapters/none/prefix")
        problem(missing, 404)
    least = 20 * len(answer.content)
    acme = _until(server.client(), "/v1/tenants/acme/live", lambda found: sum(found["bytes"]) >= least)
    assert acme["problems"] == {}
    assert any(acme["p99"])
    _until(server.client(), "/v1/tenants/beta/live", lambda found: _missing(found) == 20)
    whole = _until(server.client(), "/v1/live", lambda found: _missing(found) == 20)
    assert {tier["name"] for tier in whole["tiers"]} == {"device", "host"}
    assert {one["tenant"] for one in whole["tenants"]} >= {"acme", "beta"}
    problem(server.client().get("/v1/tenants/none/live"), 404, "not-found")


def test_a_tenant_that_was_made_again_sees_nothing_of_before(server: Server) -> None:
    """Names are given again, numbers are not."""
    admin = server.client()
    admin.put("/v1/tenants/again")
    _until(admin, "/v1/tenants/again/live", lambda found: found["at"])
    for _ in range(5):
        problem(admin.get("/v1/tenants/again/adapters/none"), 404)
    _until(admin, "/v1/tenants/again/live", lambda found: _missing(found) == 5)
    assert admin.delete("/v1/tenants/again").status_code == 204
    assert admin.put("/v1/tenants/again").status_code == 201
    assert _missing(admin.get("/v1/tenants/again/live").json()) == 0


def test_a_stream_goes_on(server: Server) -> None:
    """The first event has what was, the next one what came since; all requests are in them once."""
    _until(server.client(), "/v1/tenants/acme/live", lambda found: found["at"])
    with server.client().stream("GET", "/v1/tenants/acme/live", headers=STREAM, timeout=60) as answer:
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert answer.headers["cache-control"] == "no-store"
        events = _events(answer)
        first = next(events)
        second = next(events)
        assert second["at"][0] == first["at"][-1] + first["seconds"]
        assert first["replica"] == second["replica"] == server.client().get("/v1/replicas").json()["items"][0]["id"]


@pytest.mark.one_process("each process bounds its own streams")
def test_too_many_streams(server: Server) -> None:
    """A tenant has a quarter of the places of each worker; then it is refused, and requests are not."""
    client = server.client(_new_key(server, "beta")["key"])  # no other test left it a stream that ends at this moment
    opened: list[httpx.Response] = []
    statuses: list[httpx.Response] = []
    for _ in range(20):
        request = client.build_request("GET", "/v1/tenants/beta/live", headers=STREAM)
        answer = client.send(request, stream=True)
        (opened if answer.status_code == 200 else statuses).append(answer)
        if statuses:
            break
    (refused,) = statuses
    refused.read()
    assert "watchers here" in problem(refused, 503, "overloaded")["detail"]
    assert 2 <= len(opened) <= 4
    assert client.get("/v1/tenants/beta/adapters").status_code == 200
    for answer in opened:
        answer.close()


@pytest.mark.parametrize("tenant", ["acme", None])
def test_a_stream_ends_with_its_key(server: Server, tenant: str | None) -> None:
    """The stream of a key that is revoked ends, whichever worker has it."""
    made = _new_key(server, tenant)
    path = "/v1/live" if tenant is None else f"/v1/tenants/{tenant}/live"
    owner = "/v1/keys" if tenant is None else f"/v1/tenants/{tenant}/keys"
    with server.client(made["key"]).stream("GET", path, headers=STREAM, timeout=60) as answer:
        events = _events(answer)
        next(events)
        assert server.client().delete(f"{owner}/{made['id']}").status_code == 204
        _ends(events)


def test_a_stream_ends_with_its_session(server: Server) -> None:
    """Signing out ends it."""
    page = {"X-Prefix-CSRF": "1", "Origin": server.url}
    with httpx.Client(base_url=server.url, timeout=60) as client:
        assert client.post("/ui/session", json={"key": server.admin_key}, headers=page).status_code == 201
        with client.stream("GET", "/v1/live", headers={**STREAM, **page}) as answer:
            events = _events(answer)
            next(events)
            assert client.delete("/ui/session", headers=page).status_code == 204
            _ends(events)


@pytest.mark.parametrize("path", ["/v1/tenants/acme/live", "/v1/changes"])
def test_a_session_ends_with_its_key_in_all_workers(server: Server, path: str) -> None:
    """Its streams end, and every request from then on is refused, whichever worker answers."""
    page = {"X-Prefix-CSRF": "1", "Origin": server.url}
    made = _new_key(server, "acme")
    with httpx.Client(base_url=server.url, timeout=60) as client:
        assert client.post("/ui/session", json={"key": made["key"]}, headers=page).status_code == 201
        with client.stream("GET", path, headers={**STREAM, **page}) as answer:
            lines = answer.iter_lines()
            next(lines)
            assert server.client().delete(f"/v1/tenants/acme/keys/{made['id']}").status_code == 204
            cookie = {"Cookie": f"prefix-session={client.cookies['prefix-session']}", **page}
            for _ in range(8):
                problem(httpx.get(f"{server.url}/v1/whoami", headers=cookie), 401, "unauthenticated")
            _ends(lines)


def test_a_stream_ends_with_the_service(server: Server) -> None:
    """The service does not wait for it, as it does for requests. The last test: the service is gone."""
    client = server.client()
    with client.stream("GET", "/v1/live", headers=STREAM, timeout=60) as answer:
        events = _events(answer)
        next(events)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(90) == 0
        _ends(events)
    assert "timeout graceful shutdown exceeded" not in server.logs()  # as a request would let it
