"""Every route is asked without a key, with a foreign one, with too small a scope, and with a revoked one."""

import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx
import pytest
from fastapi.routing import APIRoute
from starlette.routing import Route

from prefix_service.api.app import create_app
from prefix_service.api.http.page_files import PAGE_FILES
from prefix_service.settings import Settings
from tests.api.helpers import MEDIA_TYPE, head, problem, raw, upload
from tests.commands import run_command
from tests.conftest import Server, running_server

HEALTH = {"/livez", "/readyz", "/v2/health/live", "/v2/health/ready"}
PUBLIC = {
    *HEALTH,
    "/openapi.json",
    "/docs",
    "/docs/start.js",
    "/docs/swagger-ui-bundle.js",
    "/docs/swagger-ui.css",
    "/docs/favicon-32x32.png",
    "/",
    "/ui/session",
    *PAGE_FILES,
}
ABSENT = ("/trace/setting", "/logging", "/status", "/register", "/unregister")
"""Endings of the paths of Triton's extensions that are refused with every key."""
OF_ANY_KEY = {"/v1/prefixes", "/v1/whoami", "/v1/changes", "/v2", "/v2/repository/index", "/v2/models/stats"}
OF_METRICS = {"/metrics", "/v1/whoami"}
"""The paths that a key of scope `metrics` can read."""
MINE, OTHER = "auth-mine", "auth-other"
SCOPES = ("read", "write", "admin")


class Call(NamedTuple):
    """A request to one route, whose path is still a template."""

    method: str
    template: str

    def to(self, tenant: str, adapter: str = "a") -> str:
        """Returns the path for a tenant."""
        return self.template.format(
            tenant=tenant, ref=adapter, name=adapter, alias="prod", key_id="0" * 16, version="1", region="r"
        )

    @property
    def scope(self) -> str:
        """Returns the smallest scope that the route accepts."""
        of_admins = ("/audit", "/usage", "/timeline", "/v1/tenants", "/v1/replicas")
        if "/keys" in self.template or self.template.endswith(of_admins):
            return "admin"
        if self.template == "/v1/tenants/{tenant}" and self.method in ("PUT", "DELETE"):
            return "admin"
        reading = ("/prefix", "/prefixes", "/infer", "/index", *ABSENT)
        reads = self.method in ("GET", "HEAD") or self.template.endswith(reading)
        return "read" if reads else "write"

    @property
    def is_for_the_platform(self) -> bool:
        """Returns whether only keys of the platform are accepted."""
        changes_tenant = self.template == "/v1/tenants/{tenant}" and self.method in ("PUT", "DELETE")
        is_for_all = self.template in OF_ANY_KEY or self.template.endswith(ABSENT)
        return ("{tenant}" not in self.template and not is_for_all) or changes_tenant


def _routes() -> Iterator[Call]:
    """Yields every route of the app, whether or not it is documented."""
    seen = set()
    for route in _flat(create_app(Settings()).routes):
        for method in sorted(route.methods or ()):
            # FastAPI's own pages answer HEAD by Starlette.
            if isinstance(route, APIRoute) or method == "GET":
                seen.add(Call(method, route.path))
    yield from sorted(seen)


def _flat(routes: Any) -> Iterator[Route]:
    for route in routes:
        if isinstance(route, Route):
            yield route
        else:
            yield from _flat(getattr(route, "original_router", route).routes)  # FastAPI keeps routers whole


ROUTES = list(_routes())
GUARDED = [call for call in ROUTES if call.template not in PUBLIC]
OF_TENANTS = [call for call in GUARDED if "{tenant}" in call.template]


def _names(calls: list[Call]) -> list[str]:
    return [f"{call.method} {call.template}" for call in calls]


@pytest.fixture(scope="module")
def keys(admin: httpx.Client) -> dict[str, str]:
    """Returns keys by `<owner> <scope>`; both tenants have the same adapter, with an alias."""
    for tenant in (MINE, OTHER):
        assert upload(admin, tenant, "a").status_code in (200, 201)
        admin.put(f"/v1/tenants/{tenant}/adapters/a/aliases/prod", json={"version": 1})
    owners = {"mine": f"/v1/tenants/{MINE}/keys", "other": f"/v1/tenants/{OTHER}/keys", "platform": "/v1/keys"}
    made = {
        f"{owner} {scope}": admin.post(path, json={"scope": scope}).json()["key"]
        for owner, path in owners.items()
        for scope in SCOPES
    }
    return made | {"metrics": admin.post("/v1/keys", json={"scope": "metrics"}).json()["key"]}


@pytest.fixture(scope="module")
def admin(server: Server) -> httpx.Client:
    """Returns a platform admin's client."""
    return server.client()


@pytest.fixture(scope="module")
def anyone(server: Server) -> httpx.Client:
    """Returns a client without a key."""
    return server.client("")


@pytest.fixture(scope="module")
def revoked(admin: httpx.Client) -> list[str]:
    """Returns keys of the platform and of a tenant that were used, and revoked."""
    found = []
    admin.put(f"/v1/tenants/{MINE}")
    for path in ("/v1/keys", f"/v1/tenants/{MINE}/keys"):
        made = admin.post(path, json={"scope": "admin"}).json()
        used = admin.get(f"/v1/tenants/{MINE}", headers={"Authorization": f"Bearer {made['key']}"})
        assert used.status_code == 200
        assert admin.delete(f"{path}/{made['id']}").status_code == 204
        found.append(made["key"])
    return found


def _call(anyone: httpx.Client, call: Call, path: str, key: str) -> httpx.Response:
    """Sends a request that is well-formed, as far as that is known without a body."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    if call.method in ("POST", "PUT") and not call.template.endswith("/{tenant}"):
        headers["Content-Type"] = "application/json"
    return anyone.request(call.method, path, headers=headers, content=b"")


def test_the_list_of_routes_is_not_empty() -> None:
    """The enumeration finds the routes that exist, so that the tests below mean something."""
    assert len(GUARDED) >= 25
    assert Call("GET", "/v1/tenants/{tenant}/adapters/{ref}/prefix") in ROUTES
    assert {call.template for call in ROUTES} >= PUBLIC


@pytest.mark.parametrize("call", GUARDED, ids=_names(GUARDED))
def test_without_a_valid_key(server: Server, anyone: httpx.Client, revoked: list[str], call: Call) -> None:
    """Without a valid key every route but the public ones answers 401 with a challenge, whether or not the resource
    exists. A revoked key is not valid.
    """
    bad = [
        *revoked,
        "",
        "x",
        "pfx_0000000000000000_" + "0" * 48 + "_00000000",
        server.admin_key[:-1],
        server.admin_key + "0",
    ]
    for key in bad:
        for tenant in (MINE, "auth-none"):
            answer = _call(anyone, call, call.to(tenant), key)
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"].startswith("Bearer")
            if call.method != "HEAD":
                problem(answer, 401, "unauthenticated")


@pytest.mark.parametrize(
    "path", ["/nowhere", "/v1", "/v1/", "/v1/tenants/", "/redoc", "/v2", "//livez", "/livez/", "/ui/", "/ui/x"]
)
def test_without_a_key_where_nothing_is(server: Server, path: str) -> None:
    """Without a key a path that does not exist is answered with 401, like one that does."""
    assert raw(server, head("GET", path)).status == 401


@pytest.mark.parametrize("header", ["Basic eDp5", "Bearer", "{key}", "Token {key}", "Bearer {key} x"])
def test_authorization_headers_that_are_none(server: Server, header: str) -> None:
    """The service accepts `Bearer <key>` and no other form."""
    value = header.format(key=server.admin_key)
    problem(httpx.get(f"{server.url}/v1/keys", headers={"Authorization": value}), 401, "unauthenticated")


def test_scheme_is_case_insensitive(server: Server) -> None:
    """The scheme `bearer` means `Bearer`, as in RFC 9110."""
    for scheme in ("bearer", "BEARER"):
        assert httpx.get(f"{server.url}/v1/keys", headers={"Authorization": f"{scheme} {server.admin_key}"}).is_success


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("call", OF_TENANTS, ids=_names(OF_TENANTS))
def test_with_a_foreign_key(
    admin: httpx.Client, anyone: httpx.Client, keys: dict[str, str], call: Call, scope: str
) -> None:
    """Another tenant's resource is 404 with the words of a missing one, and nothing is changed."""
    key = keys[f"other {scope}"]
    foreign, missing = (_call(anyone, call, call.to(tenant), key) for tenant in (MINE, "auth-none"))
    assert foreign.status_code == missing.status_code == 404
    if call.method != "HEAD":
        body = problem(foreign, 404, "not-found")
        assert {**body, "detail": ""} == {**problem(missing, 404, "not-found"), "detail": ""}
        assert body["detail"].replace(MINE, "auth-none") == missing.json()["detail"]
    assert admin.get(f"/v1/tenants/{MINE}/adapters/a@prod").status_code == 200


@pytest.mark.parametrize("call", GUARDED, ids=_names(GUARDED))
def test_with_too_small_a_scope(admin: httpx.Client, anyone: httpx.Client, keys: dict[str, str], call: Call) -> None:
    """A valid key gets 403 if its scope is too small, or if it is a tenant's and the platform's is needed."""
    refused = {f"{owner} {scope}" for owner in ("mine", "platform") for scope in SCOPES[: SCOPES.index(call.scope)]}
    if call.is_for_the_platform:
        refused |= {f"mine {scope}" for scope in SCOPES}
    for name in refused:
        answer = _call(anyone, call, call.to(MINE), keys[name])
        assert answer.status_code == 403, name
        if call.method != "HEAD":
            problem(answer, 403, "forbidden")
    assert admin.get(f"/v1/tenants/{MINE}/adapters/a@prod").status_code == 200


@pytest.mark.parametrize("call", GUARDED, ids=_names(GUARDED))
def test_with_the_scope_that_is_needed(anyone: httpx.Client, keys: dict[str, str], call: Call) -> None:
    """The smallest accepted scope suffices; the requests are for missing things, so that they change nothing."""
    owners = ["platform"] if call.is_for_the_platform else ["mine", "platform"]
    tenant = "auth-none" if call == Call("DELETE", "/v1/tenants/{tenant}") else MINE
    for owner in owners:
        answer = _call(anyone, call, call.to(tenant, "b"), keys[f"{owner} {call.scope}"])
        assert answer.status_code not in (401, 403)
        assert answer.status_code < 500


@pytest.mark.parametrize("call", GUARDED, ids=_names(GUARDED))
def test_with_a_key_for_metrics(admin: httpx.Client, anyone: httpx.Client, keys: dict[str, str], call: Call) -> None:
    """A metrics key reads the metrics and itself, and nothing else, not even a remembered answer."""
    for _ in range(2):  # the second time the admin's answer is remembered
        assert admin.get(f"/v1/tenants/{MINE}/adapters/a/prefix").status_code == 200
    for tenant in (MINE, "auth-none"):
        answer = _call(anyone, call, call.to(tenant), keys["metrics"])
        if call.template in OF_METRICS:
            assert answer.status_code == 200
        else:
            assert answer.status_code == 403
            if call.method != "HEAD":
                assert "for GET /metrics and GET /v1/whoami alone" in problem(answer, 403, "forbidden")["detail"]


@pytest.mark.parametrize("path", ["/nowhere", "/metrics/", "/v1/whoami/", "/v1"])
def test_with_a_key_for_metrics_where_nothing_is(server: Server, keys: dict[str, str], path: str) -> None:
    """A metrics key gets 403 for any other path, whether or not it exists."""
    assert raw(server, head("GET", path, Authorization=f"Bearer {keys['metrics']}")).status == 403


@pytest.mark.parametrize("path", sorted(PUBLIC - {"/ui/session"}))
def test_public_routes(anyone: httpx.Client, path: str) -> None:
    """Public routes answer without a key and with a bad one."""
    assert anyone.get(path).status_code == 200
    assert anyone.get(path, headers={"Authorization": "Bearer x"}).status_code == 200


def test_a_platform_read_key_serves_all_tenants(server: Server, keys: dict[str, str]) -> None:
    """A platform's read key reads every tenant's adapters, so that a fleet of workers needs one key."""
    client = server.client(keys["platform read"])
    for tenant in (MINE, OTHER):
        assert client.get(f"/v1/tenants/{tenant}/adapters/a/prefix").status_code == 200
        assert client.post(f"/v1/tenants/{tenant}/adapters/a/prefix", json={}).status_code == 200


def test_a_tenants_writer_does_not_make_tenants(server: Server, keys: dict[str, str]) -> None:
    """Only a platform admin's first upload creates a tenant."""
    problem(upload(server.client(keys["platform write"]), "auth-new", "a"), 404, "not-found")
    problem(upload(server.client(keys["mine admin"]), "auth-new", "a"), 404, "not-found")
    problem(server.client().get("/v1/tenants/auth-new"), 404, "not-found")


def test_keys_are_told_once(server: Server, keys: dict[str, str]) -> None:
    """Only the 201 has the key's text; listings show what it is for, and since when."""
    client = server.client(keys["mine admin"])
    made = client.post(f"/v1/tenants/{MINE}/keys", json={"scope": "read", "name": "worker"})
    assert made.status_code == 201
    assert made.headers["content-type"] == "application/json"
    told = made.json()
    assert told.keys() == {"id", "tenant", "scope", "name", "created", "expires", "last_used", "key"}
    assert (told["tenant"], told["scope"], told["name"], told["expires"]) == (MINE, "read", "worker", None)
    listing = client.get(f"/v1/tenants/{MINE}/keys")
    assert told["key"] not in listing.text
    assert {k: v for k, v in told.items() if k != "key"} in listing.json()["items"]
    assert client.get(f"/v1/tenants/{MINE}/keys/{told['id']}").json() == {k: v for k, v in told.items() if k != "key"}
    problem(server.client().get(f"/v1/keys/{told['id']}"), 404, "not-found")
    assert {item["tenant"] for item in listing.json()["items"]} == {MINE}
    assert {item["tenant"] for item in server.client().get("/v1/keys").json()["items"]} == {None}


def test_keys_of_a_tenant_that_is_missing(server: Server) -> None:
    """A missing tenant's keys cannot be listed, made or revoked, and platform keys are not reached through one."""
    admin, path = server.client(), "/v1/tenants/auth-none/keys"
    for answer in (admin.get(path), admin.post(path, json={"scope": "read"}), admin.delete(f"{path}/{'0' * 16}")):
        problem(answer, 404, "not-found")
    platform = admin.post("/v1/keys", json={"scope": "read"}).json()
    problem(admin.delete(f"{path}/{platform['id']}"), 404, "not-found")
    problem(admin.delete(f"/v1/tenants/{MINE}/keys/{platform['id']}"), 404, "not-found")
    assert server.client(platform["key"]).get(f"/v1/tenants/{MINE}").status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"scope": "root"},
        {"scope": "read", "more": 1},
        {"scope": "read", "name": "x" * 201},
        {"scope": "read", "expires": "x"},
        {"scope": "read", "expires": 4102444800},
        {"scope": "read", "expires": "2001-01-01T00:00:00Z"},
        {"scope": "read", "expires": "9999-12-31T23:59:59-14:00"},
    ],
    ids=str,
)
def test_keys_that_are_malformed(server: Server, body: dict[str, Any]) -> None:
    """A key's scope must be known, its name short, and its end a moment in the future or nothing."""
    problem(server.client().post("/v1/keys", json=body), 422, "invalid-request")


@pytest.mark.parametrize("hours", [0, 9, -7])
def test_keys_end_when_they_should(server: Server, hours: int) -> None:
    """`expires` is a moment in any time zone, after which the key is refused."""
    zone = f"{hours:+03}:00"
    for seconds in (3, 30):  # a moment may be over before a slow machine has used the key
        moment = datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=seconds)
        local = (moment + timedelta(hours=hours)).strftime("%Y-%m-%dT%H:%M:%S") + zone
        answer = server.client().post("/v1/keys", json={"scope": "admin", "expires": local})
        if answer.status_code == 422 and datetime.now(UTC) > moment:
            continue
        made = answer.json()
        assert made["expires"] == moment.isoformat().replace("+00:00", "Z")
        client = server.client(made["key"])
        used = client.get("/v1/keys")
        if used.status_code == 200 or datetime.now(UTC) < moment:
            break
    assert used.status_code == 200
    time.sleep(max((moment - datetime.now(UTC)).total_seconds(), 0) + 0.01)
    problem(client.get("/v1/keys"), 401, "unauthenticated")


def test_a_key_that_was_revoked_here_ends_at_once(server: Server) -> None:
    """Once the API has acknowledged a revocation, it refuses the key."""
    admin = server.client()
    admin.put(f"/v1/tenants/{MINE}")
    for path in (f"/v1/tenants/{MINE}/keys", "/v1/keys"):
        made = admin.post(path, json={"scope": "read"}).json()
        client = server.client(made["key"])
        assert client.get(f"/v1/tenants/{MINE}").status_code == 200
        assert admin.delete(f"{path}/{made['id']}").status_code == 204
        problem(client.get(f"/v1/tenants/{MINE}"), 401, "unauthenticated")
        problem(admin.delete(f"{path}/{made['id']}"), 404, "not-found")


def test_a_key_that_was_revoked_elsewhere_ends_within_a_second(server: Server) -> None:
    """A revocation by another process takes effect without a restart; a busy machine has a minute for it."""
    server.client().put(f"/v1/tenants/{MINE}")
    made = server.client().post("/v1/keys", json={"scope": "read"}).json()
    client = server.client(made["key"])
    assert client.get(f"/v1/tenants/{MINE}").status_code == 200
    done = run_command("key", "revoke", made["id"], "--platform", "--data-dir", server.data_dir)
    assert done.returncode == 0, done.stderr
    until = time.monotonic() + 60
    while client.get(f"/v1/tenants/{MINE}").status_code == 200 and time.monotonic() < until:
        time.sleep(0.05)
    problem(client.get(f"/v1/tenants/{MINE}"), 401, "unauthenticated")


def test_keys_are_nowhere_in_the_data_or_the_log(server: Server, keys: dict[str, str]) -> None:
    """The catalog stores a keyed hash, and the log has nothing of a key."""
    for path in [server.data_dir / "catalog.sqlite", server.log]:
        stored = path.read_bytes()
        for key in [*keys.values(), server.admin_key]:
            assert key.encode() not in stored
            assert key.split("_")[2].encode() not in stored
    assert (server.data_dir / "bootstrap.key").stat().st_mode & 0o777 == 0o600
    assert server.admin_key not in server.log.read_text()


def test_dev_mode_has_no_keys(tmp_path: Path) -> None:
    """`--dev` serves everybody as a platform admin, says so in the log, and makes no bootstrap key."""
    with running_server(tmp_path / "data", "--dev") as dev:
        client = dev.client("")
        assert upload(client, "acme", "a").status_code == 201
        answer = client.get("/v1/tenants/acme/adapters/a/prefix")
        assert (answer.status_code, answer.headers["content-type"]) == (200, MEDIA_TYPE)
        assert [item["tenant"] for item in client.get("/v1/tenants").json()["items"]] == ["acme"]
        assert not (dev.data_dir / "bootstrap.key").exists()
        assert "no keys" in dev.log.read_text()


def test_dev_mode_refuses_web_pages_of_other_sites(tmp_path: Path) -> None:
    """Pages of other sites change nothing by requests that a browser sends without asking first."""
    with running_server(tmp_path / "data", "--dev") as dev:
        client = dev.client("")
        assert upload(client, "acme", "a").status_code == 201
        load = "/v2/repository/models/acme/a/load"
        for origin in (
            "https://elsewhere.example",
            "null",
            "http://localhost.elsewhere.example",
            "http://127.0.0.1.nip.io",
        ):
            told = problem(client.post(load, headers={"Origin": origin}), 403, "forbidden")
            assert origin in told["detail"]
        for origin in (dev.url, "http://localhost:3000", "http://[::1]:8080"):
            assert client.post(load, headers={"Origin": origin}).status_code == 200


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Yields a service without keys, with one adapter."""
    with running_server(tmp_path_factory.mktemp("dev") / "data", "--dev") as running:
        assert upload(running.client(""), MINE, "a").status_code == 201
        yield running


@pytest.fixture(scope="module")
def visitor(dev: Server) -> httpx.Client:
    """Returns a client of the service without keys."""
    return dev.client("")


def _status(visitor: httpx.Client, call: Call, **headers: str) -> int:
    """Returns the status of a request without a body that changes nothing if it is carried out."""
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    return visitor.request(call.method, call.to("auth-none"), headers=fields).status_code


FOREIGN_HOSTS = (
    *("attacker.example", "attacker.example:8080", "localhost.attacker.example", "127.0.0.1.nip.io", "127.0.0.2"),
    *("1.1.1.1", "localhost:80:80", "localhost@attacker.example", "[::2]", "x127.0.0.1", "127x0x0x1"),
)


@pytest.mark.parametrize("call", GUARDED, ids=_names(GUARDED))
def test_dev_mode_answers_to_names_of_this_machine_alone(dev: Server, visitor: httpx.Client, call: Call) -> None:
    """Dev mode refuses foreign Hosts on every route that shows data: to its browser, a page whose name leads here (DNS
    rebinding) is of the same origin, and sends no Origin.
    """
    for host in FOREIGN_HOSTS[:4]:
        assert _status(visitor, call, Host=host) == 403, host
    port = urlsplit(dev.url).port
    for host in (
        "localhost",
        "127.0.0.1",
        "[::1]",
        f"localhost:{port}",
        f"127.0.0.1:{port}",
        f"[::1]:{port}",
        "LocalHost",
    ):
        assert _status(visitor, call, Host=host) != 403, host


def test_dev_mode_says_what_is_wrong_with_a_host(dev: Server) -> None:
    """The error lists the hosts that dev mode answers to."""
    for host in FOREIGN_HOSTS:
        answer = raw(dev, head("GET", "/v1/tenants", Host=host))
        assert answer.status in (400, 403), host
        assert (
            answer.status == 400 or "answers to the hosts localhost, 127.0.0.1 and [::1] alone" in answer.body.decode()
        )
    assert raw(dev, b"GET /v1/tenants HTTP/1.0\r\n\r\n").status in (400, 403)
    for path in sorted(HEALTH):
        assert raw(dev, head("GET", path, Host="attacker.example")).status == 200


@pytest.mark.parametrize("call", GUARDED, ids=_names(GUARDED))
def test_dev_mode_refuses_what_other_sites_ask(visitor: httpx.Client, call: Call) -> None:
    """Dev mode refuses requests that a browser marks as another site's, even without an Origin."""
    for site in ("cross-site", "same-site", "else"):
        assert _status(visitor, call, Sec_Fetch_Site=site) == 403, site
    for site in ("same-origin", "none"):
        assert _status(visitor, call, Sec_Fetch_Site=site) != 403, site


def test_dev_mode_on_a_unix_socket_has_no_name(tmp_path: Path) -> None:
    """On a Unix socket any Host is accepted, and requests of other sites' pages are refused all the same."""
    with running_server(tmp_path / "data", "--dev", "--uds", str(tmp_path / "s"), uds=tmp_path / "s") as dev:
        client = dev.client("")
        assert client.get("/v1/tenants", headers={"Host": "prefix-service"}).status_code == 200
        for headers in ({"Origin": "https://elsewhere.example"}, {"Sec-Fetch-Site": "cross-site"}):
            problem(client.get("/v1/tenants", headers=headers), 403, "forbidden")
