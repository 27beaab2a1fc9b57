"""Authority holds until the write: what ends a key or a tenant while a body arrives refuses the request."""

import json
import socket
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

import httpx
import pytest
import torch
from safetensors.torch import save

from prefix_service.api.app import create_app
from prefix_service.api.middleware.auth import PUBLIC
from prefix_service.settings import Settings
from tests.api.helpers import CONFIG, MEDIA_TYPE, RawAnswer, head, read_answer, upload, weights
from tests.conftest import Server, running_server

WRITES: Final = ("post", "put", "patch", "delete")
READS: Final = ("/prefix", "/prefixes", "/infer", "/index")
"""How the paths end of what is asked for with POST, and changes nothing."""


class Route(NamedTuple):
    """A writing route that takes a body, and a body that it takes."""

    method: str
    template: str
    body: bytes
    media_type: str = "application/json"

    @property
    def has_tenant(self) -> bool:
        return "{tenant}" in self.template

    @property
    def has_key(self) -> bool:
        return "{key_id}" in self.template

    def path(self, tenant: str, key_id: str = "") -> str:
        return self.template.format(tenant=tenant, name="a", ref="a@1", alias="prod", key_id=key_id)


MASK: Final = save({"attention_mask": torch.tensor([[0, 1, 1]])})


def _form() -> tuple[bytes, str]:
    files = {"adapter_config.json": json.dumps(CONFIG).encode(), "adapter_model.safetensors": weights(7)}
    request = httpx.Request("POST", "http://localhost", files=files)
    return request.read(), request.headers["content-type"]


ROUTES: Final = (
    Route("post", "/v1/tenants/{tenant}/adapters/{name}/versions", *_form()),
    Route("post", "/v1/tenants/{tenant}/adapters/{name}/versions", json.dumps({"config": CONFIG, "seed": 99}).encode()),
    Route("put", "/v1/tenants/{tenant}/adapters/{name}/aliases/{alias}", b'{"version": 2, "preload": true}'),
    Route("put", "/v1/tenants/{tenant}/adapters/{ref}/residency", b'{"pinned": true}'),
    Route("put", "/v1/tenants/{tenant}/adapters/{ref}/card", b"# Card", "text/markdown"),
    Route("put", "/v1/tenants/{tenant}/adapters/{ref}/annotations", b'{"run": "17"}'),
    Route("put", "/v1/tenants/{tenant}/adapters/{ref}/base-model", b'{"tokenizer": "17"}'),
    Route("post", "/v1/tenants/{tenant}/keys", b'{"scope": "admin"}'),
    Route("post", "/v1/keys", b'{"scope": "admin"}'),
    Route("put", "/v1/tenants/{tenant}/keys/{key_id}", b'{"expires": "2999-12-31T00:00:00Z"}'),
    Route("put", "/v1/keys/{key_id}", b'{"expires": "2999-12-31T00:00:00Z"}'),
    Route("put", "/v1/tenants/{tenant}", b'{"max_adapters": 7}'),
    Route("post", "/v2/repository/models/{tenant}/{name}/load", b'{"parameters": {}}'),
    Route("post", "/v2/repository/models/{tenant}/{name}/unload", b'{"parameters": {}}'),
)
READING: Final = (
    ("/v1/tenants/{tenant}/adapters/{ref}/prefix", b'{"batch_size": 2}', "application/json"),
    ("/v1/tenants/{tenant}/adapters/{ref}/prefix", MASK, MEDIA_TYPE),
    ("/v1/prefixes", b'{"rows": ["revoked-reads/a"]}', "application/json"),
    ("/v2/models/{tenant}/{name}/infer", b'{"inputs": []}', "application/json"),
    ("/v2/repository/index", b'{"ready": true}', "application/json"),
)
FOR_THE_PLATFORM: Final = ("/v1/keys", "/v1/keys/{key_id}", "/v1/tenants/{tenant}")


def test_every_writing_route_with_a_body_is_tried_here() -> None:
    """A route that is added must be added above, too. What takes no body is refused in tests/catalog/test_authority."""
    document = create_app(Settings()).openapi()["paths"]
    writes = {
        (method, path)
        for path, methods in document.items()
        for method in WRITES
        if "requestBody" in methods.get(method, {}) and not path.endswith(READS) and path not in PUBLIC
    }
    assert writes == {(route.method, route.template) for route in ROUTES}


class Held:
    """A request whose body is half there: the service has checked its key, and asked for the rest."""

    def __init__(self, server: Server, key: dict[str, Any], route: Route, tenant: str, of_key: str = "") -> None:
        self.key, self.route, self.tenant = key, route, tenant
        address = urlsplit(server.url)
        fields = {"Authorization": f"Bearer {key['key']}", "Content-Type": route.media_type}
        fields |= {"Content_Length": str(len(route.body)), "Expect": "100-continue"}
        self._connection = socket.create_connection((address.hostname, address.port), timeout=60)
        self._connection.sendall(head(route.method.upper(), route.path(tenant, of_key), **fields))
        line = b""
        while not line.endswith(b"\r\n\r\n"):  # which comes when the route reads the body
            line += self._connection.recv(1)
        assert line.startswith(b"HTTP/1.1 100 ")
        self._connection.sendall(route.body[: len(route.body) // 2])

    def finish(self) -> RawAnswer:
        with self._connection:
            self._connection.sendall(self.route.body[len(self.route.body) // 2 :])
            return read_answer(self._connection)


@pytest.fixture(scope="module", params=[1, 2], ids=["one worker", "two workers"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    data = tmp_path_factory.mktemp("authority") / "data"
    patient = {"PREFIX_RECEIVE_TIMEOUT": "300"}  # with bodies that wait until those of all routes are half there
    with running_server(data, "--workers", str(request.param), environment=patient) as running:
        yield running


def _key(admin: httpx.Client, tenant: str | None, seconds: float | None) -> dict[str, Any]:
    """A new admin key, of the platform without a tenant, that ends in so many seconds."""
    path = "/v1/keys" if tenant is None else f"/v1/tenants/{tenant}/keys"
    expires = None if seconds is None else (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()
    answer = admin.post(path, json={"scope": "admin", "expires": expires})
    assert answer.status_code == 201, answer.text
    made: dict[str, Any] = answer.json()
    return made


def _held(
    server: Server, admin: httpx.Client, name: str, seconds: float | None = None, *, tenants_alone: bool = False
) -> list[Held]:
    """Every route with a key of the platform and one of its tenant, each on a tenant of its own."""
    found = []
    for number, route in enumerate(ROUTES):
        if tenants_alone and not route.has_tenant:
            continue
        for owner in ("platform",) if route.template in FOR_THE_PLATFORM else ("platform", "own"):
            tenant = f"{name}-{number}-{owner}"
            for seed in (0, 1):
                assert upload(admin, tenant, "a", file=weights(seed)).status_code == 201
            if "unload" in route.template:
                assert admin.post(route.path(tenant).replace("unload", "load")).status_code == 200
            other = _key(admin, tenant if route.has_tenant else None, None)["id"] if route.has_key else ""
            found.append((route, tenant, None if owner == "platform" else tenant, other))
    return [Held(server, _key(admin, owner, seconds), route, tenant, other) for route, tenant, owner, other in found]


def _audit(admin: httpx.Client) -> list[dict[str, Any]]:
    """Every change, newest first."""
    found: list[dict[str, Any]] = admin.get("/v1/audit", params={"limit": 1000}).json()["items"]
    return found


def _refused(admin: httpx.Client, held: list[Held], status: Callable[[Held], int]) -> None:
    """Finish every request, and assert that each was refused and changed nothing."""
    residency = [admin.get(f"/v1/tenants/{one.tenant}/adapters/a/residency").json() for one in held]
    for one in held:
        answer = one.finish()
        assert answer.status == status(one), (one.route, one.tenant, answer)
    ids = {one.key["id"] for one in held}
    assert [entry for entry in _audit(admin) if entry["key_id"] in ids] == []
    assert [admin.get(f"/v1/tenants/{one.tenant}/adapters/a/residency").json() for one in held] == residency


def test_what_nothing_ends_is_carried_out(server: Server) -> None:
    """The requests below are refused for their keys alone."""
    admin = server.client()
    for one in _held(server, admin, "alive"):
        answer = one.finish()
        assert answer.status in (200, 201, 204), (one.route, answer)
        audited = {entry["key_id"] for entry in _audit(admin)}
        assert one.key["id"] in audited


def test_a_key_that_is_revoked(server: Server) -> None:
    """401, as if it had been so from the beginning."""
    admin = server.client()
    held = _held(server, admin, "revoked")
    for one in held:
        owner = "/v1" if one.key["tenant"] is None else f"/v1/tenants/{one.tenant}"
        assert admin.delete(f"{owner}/keys/{one.key['id']}").status_code == 204
    _refused(admin, held, lambda _: 401)


def test_a_key_that_is_revoked_reads_nothing_more(server: Server) -> None:
    """Each read that takes a body is 401, too, if its key was revoked while the body arrived."""
    admin = server.client()
    assert upload(admin, "revoked-reads", "a", file=weights(0)).status_code == 201
    for seconds in (1, 10):  # within which every process hears of it; a machine that is slow, in more
        held = []
        for template, body, media_type in READING:
            key = _key(admin, "revoked-reads", None)
            held.append(Held(server, key, Route("post", template, body, media_type), "revoked-reads"))
            assert admin.delete(f"/v1/tenants/revoked-reads/keys/{key['id']}").status_code == 204
        time.sleep(seconds)
        if (statuses := [one.finish().status for one in held]) == [401] * len(READING):
            break
    assert statuses == [401] * len(READING)


def test_a_key_that_expires(server: Server) -> None:
    """401 as soon as its last moment is over."""
    admin = server.client()
    held = _held(server, admin, "expired", seconds=10)
    last = max(datetime.fromisoformat(one.key["expires"]) for one in held)
    time.sleep(max(0.0, (last - datetime.now(UTC)).total_seconds() + 0.01))
    _refused(admin, held, lambda _: 401)


@pytest.mark.parametrize("is_made_again", [False, True], ids=["deleted", "made again"])
def test_a_tenant_that_is_deleted(server: Server, is_made_again: bool) -> None:
    """401 for its keys, 404 for the platform's; one of the same name, made since, is another."""
    admin = server.client()
    held = _held(server, admin, f"gone-{is_made_again}".lower(), tenants_alone=True)
    for one in held:
        assert admin.delete(f"/v1/tenants/{one.tenant}").status_code == 204
        if is_made_again:
            assert admin.put(f"/v1/tenants/{one.tenant}").status_code == 201
            for seed in (0, 1):
                assert upload(admin, one.tenant, "a", file=weights(seed)).status_code == 201
    _refused(admin, held, lambda one: 404 if one.key["tenant"] is None else 401)
    for one in held:
        tenant = admin.get(f"/v1/tenants/{one.tenant}")
        assert tenant.status_code == (200 if is_made_again else 404)
        if is_made_again:
            assert tenant.json()["max_adapters"] is None
            listed = admin.get(f"/v1/tenants/{one.tenant}/adapters/a/versions").json()["items"]
            assert len(listed) == 2


@pytest.mark.parametrize("parser", ["httptools", "h11"])
def test_a_body_that_is_no_upload_has_its_seconds_in_all(tmp_path: Path, parser: str) -> None:
    """Bytes that arrive bring no more time; an upload that makes progress has as long as it needs."""
    environment = {"PREFIX_RECEIVE_TIMEOUT": "1", "PREFIX_HTTP_PARSER": parser}
    with running_server(tmp_path / "data", environment=environment) as server:
        key = {"key": server.admin_key}
        padded = b'{"scope": "read"' + b" " * (1_000_000) + b"}"
        began = time.monotonic()
        held = Held(server, key, Route("post", "/v1/keys", padded), "acme")
        connection = held._connection
        with connection:
            connection.setblocking(False)
            answer = b""
            while not answer and time.monotonic() < began + 60:
                try:
                    answer = connection.recv(65536)
                except BlockingIOError:
                    connection.send(b" " * (16 << 10))  # more than the least rate, and not all of it within six seconds
                    time.sleep(0.2)
            assert answer.startswith(b"HTTP/1.1 408 ")
            assert b"is not whole after 1 seconds" in answer
        assert time.monotonic() - began > 0.5
