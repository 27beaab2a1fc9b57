"""The front door: `/`, and sessions of the page, whose cookie counts in calls of the page itself alone."""

import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import sqlalchemy as sa

from prefix_service.catalog.schema import metadata
from tests.api.helpers import CONFIG, head, problem, read_answer
from tests.conftest import Server, running_server

TENANT = "front"


@pytest.fixture(scope="module")
def page(server: Server) -> dict[str, str]:
    """Returns the headers of the page's own calls."""
    return {"X-Prefix-CSRF": "1", "Origin": server.url}


@pytest.fixture
def anyone(server: Server) -> Iterator[httpx.Client]:
    """Yields a browser that has not signed in."""
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


@pytest.fixture
def signed_in(server: Server, page: dict[str, str], anyone: httpx.Client) -> httpx.Client:
    """Returns a browser with a session of a tenant's writer."""
    server.client().put(f"/v1/tenants/{TENANT}")
    made = server.client().post(f"/v1/tenants/{TENANT}/keys", json={"scope": "write"}).json()
    assert anyone.post("/ui/session", json={"key": made["key"]}, headers=page).status_code == 201
    return anyone


def test_the_front_door(anyone: httpx.Client) -> None:
    """A browser is led to the page, and other callers get name, version and links."""
    answer = anyone.get("/", headers={"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"})
    assert (answer.status_code, answer.headers["location"]) == (303, "ui")
    told = anyone.get("/").json()
    assert told["name"] == "prefix-service"
    for link in told["links"].values():
        assert anyone.get(link).status_code == 200


def test_signing_in_and_out(server: Server, page: dict[str, str], signed_in: httpx.Client) -> None:
    """A session has the key's tenant and scope, reads and writes, and ends."""
    told = signed_in.get("/v1/whoami", headers={"X-Prefix-CSRF": "1"}).json()
    assert (told["tenant"], told["scope"]) == (TENANT, "write")
    path = f"/v1/tenants/{TENANT}/adapters/a/versions"
    assert signed_in.post(path, json={"config": CONFIG}, headers=page).status_code == 201
    problem(signed_in.get("/v1/tenants/other/adapters", headers=page), 404, "not-found")
    problem(signed_in.get(f"/v1/tenants/{TENANT}/keys", headers=page), 403, "forbidden")
    cookie = signed_in.cookies["prefix-session"]
    ended = signed_in.delete("/ui/session", headers=page)
    assert ended.status_code == 204
    assert "Max-Age=0" in ended.headers["set-cookie"]
    kept = {"Cookie": f"prefix-session={cookie}", **page}
    assert "has ended" in problem(httpx.get(f"{server.url}/v1/whoami", headers=kept), 401, "unauthenticated")["detail"]


def test_signing_out_ends_a_request_whose_body_still_arrives(
    server: Server, page: dict[str, str], signed_in: httpx.Client
) -> None:
    """A change that a session began is refused once the session was ended, although its key is valid."""
    body = json.dumps({"config": CONFIG}).encode()
    path = f"/v1/tenants/{TENANT}/adapters/late/versions"
    fields = {**page, "Cookie": f"prefix-session={signed_in.cookies['prefix-session']}"}
    fields |= {"Content_Type": "application/json", "Content_Length": str(len(body)), "Expect": "100-continue"}
    address = urlsplit(server.url)
    fields["Host"] = address.netloc
    with socket.create_connection((address.hostname, address.port), timeout=60) as connection:
        connection.sendall(head("POST", path, **fields))
        line = b""
        while not line.endswith(b"\r\n\r\n"):  # which comes when the route reads the body
            line += connection.recv(1)
        assert line.startswith(b"HTTP/1.1 100 ")
        connection.sendall(body[:10])
        assert signed_in.delete("/ui/session", headers=page).status_code == 204
        connection.sendall(body[10:])
        answer = read_answer(connection)
    assert answer.status == 401
    assert b"sign in again" in answer.body
    problem(server.client().get(f"/v1/tenants/{TENANT}/adapters/late"), 404)


def test_who_is_signed_in(page: dict[str, str], signed_in: httpx.Client) -> None:
    """The page asks this first; without a session it is null, and no error."""
    assert signed_in.get("/ui/session", headers=page).json()["tenant"] == TENANT
    assert signed_in.get("/ui/session").json() is None
    assert signed_in.delete("/ui/session", headers=page).status_code == 204
    assert signed_in.get("/ui/session", headers=page).json() is None


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_the_cookie(server: Server, anyone: httpx.Client, scheme: str) -> None:
    """No script reads it and no other site sends it; behind TLS it never travels without, and no other host sets it."""
    host = server.url.partition("//")[2]
    headers = {"X-Prefix-CSRF": "1", "Origin": f"{scheme}://{host}"}
    answer = anyone.post("/ui/session", json={"key": server.admin_key}, headers=headers)
    name, *attributes = answer.headers["set-cookie"].split("; ")
    prefix = "__Host-" if scheme == "https" else ""
    assert re.fullmatch(rf"{prefix}prefix-session=[A-Za-z0-9_-]{{55}}", name)
    expected = {"Path=/", "Max-Age=43200", "HttpOnly", "SameSite=Strict"}
    assert set(attributes) == expected | ({"Secure"} if scheme == "https" else set())
    assert server.admin_key not in answer.text
    assert answer.headers["cache-control"] == "no-store"
    with server.writing() as catalog:
        for table in metadata.sorted_tables:
            assert name.partition("=")[2] not in str(catalog.execute(sa.select(table)).all())
    assert name.partition("=")[2] not in server.logs()


_FOREIGN: list[dict[str, str]] = [
    {},
    {"Origin": "{url}"},
    {"X-Prefix-CSRF": "1"},
    {"X-Prefix-CSRF": "1", "Origin": "null"},
    {"X-Prefix-CSRF": "1", "Origin": "http://evil.example"},
    {"X-Prefix-CSRF": "1", "Origin": "{url}0"},
    {"X-Prefix-CSRF": "1", "Origin": "{url}/"},
    {"X-Prefix-CSRF": "1", "Origin": "{url}", "Host": "127.0.0.1"},
    {"X-Prefix-CSRF": "1", "Origin": "{url}", "Sec-Fetch-Site": "cross-site"},
    {"X-Prefix-CSRF": "1", "Origin": "{url}", "Sec-Fetch-Site": "same-site"},
]


@pytest.mark.parametrize("sent", _FOREIGN, ids=str)
def test_pages_of_other_sites_get_nothing(server: Server, signed_in: httpx.Client, sent: dict[str, str]) -> None:
    """Without the header and the page's own Origin a session does not count, and no one is begun or ended."""
    headers = {name: value.format(url=server.url) for name, value in sent.items()}
    path = f"/v1/tenants/{TENANT}/adapters/foreign/versions"
    told = problem(signed_in.post(path, json={"config": CONFIG}, headers=headers), 401, "unauthenticated")
    assert "only in calls of the page itself, and this one " in told["detail"]
    problem(server.client().get(f"/v1/tenants/{TENANT}/adapters/foreign"), 404)
    for method in ("POST", "DELETE"):
        body = {"key": server.admin_key} if method == "POST" else None
        answer = signed_in.request(method, "/ui/session", json=body, headers=headers)
        problem(answer, 403, "forbidden")
        assert "set-cookie" not in answer.headers
    assert signed_in.get("/v1/whoami", headers={"X-Prefix-CSRF": "1"}).status_code == 200


@pytest.mark.parametrize(
    ("origin", "host"),
    [
        ("https://prefix.example.com", "prefix.example.com"),
        ("https://prefix.example.com", "Prefix.Example.com:443"),
        ("http://prefix.example.com:80", "prefix.example.com"),
        ("https://prefix.example.com:8443", "prefix.example.com:8443"),
        ("http://[::1]:8080", "[::1]:8080"),
        ("http://[::1]", "[::1]:80"),
    ],
)
def test_the_address_that_a_proxy_passes_on(server: Server, anyone: httpx.Client, origin: str, host: str) -> None:
    """The port of the scheme may be named or not."""
    headers = {"X-Prefix-CSRF": "1", "Origin": origin, "Host": host}
    assert anyone.post("/ui/session", json={"key": server.admin_key}, headers=headers).status_code == 201


@pytest.mark.parametrize("origin", ["https://prefix.example.com:8443", "http://prefix.example.com"])
def test_a_proxy_that_changes_the_address(server: Server, anyone: httpx.Client, origin: str) -> None:
    """The error names both addresses, and what to write into the proxy's configuration."""
    headers = {"X-Prefix-CSRF": "1", "Origin": origin, "Host": "prefix.example.com:443"}
    answer = anyone.post("/ui/session", json={"key": server.admin_key}, headers=headers)
    detail = problem(answer, 403, "forbidden")["detail"]
    assert f"the Origin '{origin}' and the Host 'prefix.example.com:443'" in detail
    assert "Host $http_host" in detail


def test_a_read_needs_the_header_alone(signed_in: httpx.Client) -> None:
    """Browsers send no Origin when a page reads from its own site; without the header nothing is read."""
    assert signed_in.get("/v1/whoami", headers={"X-Prefix-CSRF": "1"}).status_code == 200
    problem(signed_in.get("/v1/whoami"), 401, "unauthenticated")


def test_a_session_ends_with_its_key(server: Server, page: dict[str, str], signed_in: httpx.Client) -> None:
    """The key is looked at on every request."""
    told = signed_in.get("/v1/whoami", headers=page).json()
    assert server.client().delete(f"/v1/tenants/{TENANT}/keys/{told['id']}").status_code == 204
    problem(signed_in.get("/v1/whoami", headers=page), 401, "unauthenticated")


def test_a_key_in_the_request_counts_before_the_session(server: Server, signed_in: httpx.Client) -> None:
    """Whoever sends both means the key, also one that is wrong."""
    headers = {"Authorization": f"Bearer {server.admin_key}", "X-Prefix-CSRF": "1"}
    assert signed_in.get("/v1/whoami", headers=headers).json()["tenant"] is None
    problem(signed_in.get("/v1/whoami", headers={**headers, "Authorization": "Bearer x"}), 401, "unauthenticated")


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"key": "x"}, 401),
        ({"key": "pfx_0000000000000000_" + "0" * 48 + "_00000000"}, 401),
        ({"key": "ключ"}, 401),
        ({}, 422),
        ({"key": "x", "more": 1}, 422),
        ({"key": 1}, 422),
        ({"key": "x" * 300}, 422),
        ({"key": "x" * 5000}, 413),
    ],
    ids=lambda value: str(value)[:30],
)
def test_keys_that_sign_nobody_in(
    anyone: httpx.Client, page: dict[str, str], body: dict[str, Any], status: int
) -> None:
    """A wrong key is refused as everywhere, a malformed body in words."""
    answer = anyone.post("/ui/session", json=body, headers=page)
    problem(answer, status)
    assert "set-cookie" not in answer.headers


def test_signing_in_counts_for_the_rate_of_the_tenant(
    server: Server, anyone: httpx.Client, page: dict[str, str]
) -> None:
    """Each begins a session, which the catalog writes to its disk."""
    server.client().put("/v1/tenants/rated", json={"requests_per_second": 1})
    made = server.client().post("/v1/tenants/rated/keys", json={"scope": "read"}).json()
    answers = [anyone.post("/ui/session", json={"key": made["key"]}, headers=page) for _ in range(40)]
    refused = next(answer for answer in answers if answer.status_code != 201)
    problem(refused, 429, "rate-limited")


def test_a_key_for_metrics_sees_no_page(server: Server, anyone: httpx.Client, page: dict[str, str]) -> None:
    """Signing in with a key of scope metrics is refused, with the reason."""
    made = server.client().post("/v1/keys", json={"scope": "metrics"}).json()
    assert "metrics" in problem(anyone.post("/ui/session", json={"key": made["key"]}, headers=page), 403)["detail"]


def test_dev_mode_needs_no_session(tmp_path: Path) -> None:
    """Everybody on this machine is signed in already; a page of another site still is not."""
    with running_server(tmp_path / "data", "--dev") as dev, httpx.Client(base_url=dev.url) as client:
        page = {"X-Prefix-CSRF": "1", "Origin": dev.url}
        answer = client.post("/ui/session", json={"key": ""}, headers=page)
        assert (answer.status_code, answer.json()["id"]) == (201, "dev")
        assert "set-cookie" not in answer.headers
        assert client.get("/v1/whoami").json()["scope"] == "admin"
        assert client.get("/ui/session").json()["id"] == "dev"
        host = {**page, "Host": "evil.example", "Origin": "http://evil.example"}
        problem(client.post("/ui/session", json={"key": ""}, headers=host), 403, "forbidden")
