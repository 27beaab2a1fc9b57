"""Each tenant's requests per second are charged to it, reported in header fields, and bounded."""

import asyncio
import math
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from limits import strategies
from limits.storage import memory

from prefix_service.api.app import create_app
from prefix_service.api.middleware import rates as rates_module
from prefix_service.api.middleware.rates import RateLimits
from prefix_service.catalog.changes import QuotasChanged
from prefix_service.catalog.records import COMMAND_LINE
from prefix_service.client import PrefixClient
from prefix_service.client.transport import transport
from prefix_service.data_folder.opening import keys_of, opened
from prefix_service.errors import PrefixServiceError, RateLimited, StorageFailed
from prefix_service.settings import Settings
from tests.api.apps import served
from tests.api.helpers import head, problem, read_answer, upload
from tests.conftest import Server

pytestmark = pytest.mark.one_process("replicas divide a tenant's rate")

ADAPTERS = "/v1/tenants/acme/adapters"


class Clock:
    """The windows' clock: it stands still, so that a slow machine sends within one window what belongs there."""

    def __init__(self) -> None:
        self._shown = math.ceil(time.time()) + 0.5  # in the middle of a window

    def time(self) -> float:
        """Returns the time as `time.time` does."""
        return self._shown

    def pass_by(self, seconds: float) -> None:
        """Moves the clock by so many seconds."""
        self._shown += seconds


@dataclass
class Limited:
    """A service whose tenants' rates are a dict, and its clock."""

    url: str
    clock: Clock
    rates: dict[str, int]
    keys: dict[str, str]
    forget: Callable[[str], None]
    asked: list[str] = field(default_factory=list)
    are_known: bool = True

    def client(self, owner: str) -> httpx.Client:
        """Returns a client with the key of a tenant, or of the platform."""
        return httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {self.keys[owner]}"})

    def set(self, tenant: str, rate: int) -> None:
        """Changes a rate in a new window, in which nothing was charged."""
        self.rates[tenant] = rate
        self.forget(tenant)
        self.clock.pass_by(3)


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Limited]:
    """Yields the real app, with the rates of a dict instead of a catalog's."""
    settings = Settings(data_dir=tmp_path_factory.mktemp("rates"))
    with opened(settings), keys_of(settings) as (keyring, tenants):
        keys = {}
        for owner in ("acme", "beta", "platform"):
            if owner != "platform":
                tenants.put(owner, COMMAND_LINE)
            keys[owner] = keyring.create(None if owner == "platform" else owner, "admin", "", COMMAND_LINE)[1]
    rates: dict[str, int] = {}
    asked: list[str] = []
    app = create_app(settings)

    async def rate_of(tenant: str) -> int | None:
        asked.append(tenant)
        return rates.get(tenant)

    clock = Clock()
    with pytest.MonkeyPatch.context() as patch, served(app) as url:
        for module in (memory, strategies, rates_module):
            patch.setattr(module, "time", clock)
        limits = RateLimits(rate_of, lambda: found.are_known)
        found = Limited(url, clock, rates, keys, lambda tenant: limits.on_changes([QuotasChanged(tenant)]), asked)
        app.open(replace(app.state.prefix_service, rates=limits))
        with found.client("platform") as admin:
            assert upload(admin, "acme", "a").status_code == 201
        yield found


def _burst(client: httpx.Client, path: str, times: int) -> list[httpx.Response]:
    return [client.get(path) for _ in range(times)]


def test_above_the_rate_is_429_with_what_is_left(limited: Limited) -> None:
    """A 429 is a problem document with when to retry, and the fields of draft-ietf-httpapi-ratelimit-headers-10."""
    limited.set("acme", 5)
    with limited.client("acme") as client:
        answers = _burst(client, ADAPTERS, 8)
        assert [answer.status_code for answer in answers] == [200] * 5 + [429] * 3
        for answer, remaining in zip(answers, [4, 3, 2, 1, 0, 0, 0, 0], strict=True):
            assert answer.headers["ratelimit-policy"] == '"tenant";q=5;w=1'
            assert answer.headers["ratelimit"] == f'"tenant";r={remaining};t=1'
        refused = answers[-1]
        body = problem(refused, 429, "rate-limited")
        assert body["detail"] == "tenant 'acme' may send 5 requests a second: slow down"
        assert refused.headers["retry-after"] == "1"
        assert refused.headers["x-request-id"]
        limited.clock.pass_by(int(refused.headers["retry-after"]))
        assert client.get(ADAPTERS).status_code == 200


def test_without_a_rate_nothing_is_told(limited: Limited) -> None:
    """Without a rate no request is refused, and no answer has the fields."""
    with limited.client("beta") as client:
        answers = _burst(client, "/v1/tenants/beta/adapters", 30)
    assert {answer.status_code for answer in answers} == {200}
    assert not any("ratelimit" in answer.headers or "ratelimit-policy" in answer.headers for answer in answers)


def test_a_tenants_key_charges_its_tenant_wherever_it_asks(limited: Limited) -> None:
    """A tenant's key charges its tenant for its own resources, others', the platform's, and missing ones."""
    limited.set("acme", 4)
    with limited.client("acme") as client:
        paths = [
            "/v1/tenants/acme",
            "/v1/tenants/beta/adapters/a",
            "/v1/keys",
            "/nowhere",
            ADAPTERS,
            "/v1/tenants/acme",
        ]
        assert [client.get(path).status_code for path in paths] == [200, 404, 403, 404, 429, 429]
        assert client.get("/livez").status_code == 200
    with limited.client("beta") as other:
        assert other.get("/v1/tenants/beta").status_code == 200


def test_models_are_adapters(limited: Limited) -> None:
    """Under `/v2` a platform's key charges the tenant as under `/v1`, however the slash is written."""
    limited.set("acme", 4)
    with limited.client("platform") as client:
        answers = [client.get(f"/v2/models/acme{slash}a") for slash in ("/", "%2F")]
        answers += [client.post(f"/v2/repository/models/acme{slash}a/load") for slash in ("/", "%2F")]
        assert [answer.headers["ratelimit"] for answer in answers] == [
            f'"tenant";r={left};t=1' for left in (3, 2, 1, 0)
        ]
        refused = client.post("/v2/models/acme%2Fa/infer", json={"inputs": []})
        assert (refused.status_code, refused.json()["error"]) == (429, refused.json()["detail"])
        for path in ("/v2", "/v2/health/ready"):
            assert "ratelimit" not in client.get(path).headers
        assert "ratelimit" not in client.post("/v2/repository/index").headers


def test_a_platforms_key_charges_the_tenant_whose_adapters_it_asks_for(limited: Limited) -> None:
    """A platform's key charges a tenant for its adapters alone, so operators always reach a tenant and its keys."""
    limited.set("acme", 2)
    with limited.client("platform") as client:
        assert [client.get(path).status_code for path in [ADAPTERS, f"{ADAPTERS}/b/prefix", ADAPTERS]] == [
            200,
            404,
            429,
        ]
        for path in ("/v1/tenants/acme", "/v1/tenants/acme/keys", "/v1/tenants", "/v1/keys", "/metrics"):
            answer = client.get(path)
            assert answer.status_code == 200, path
            assert "ratelimit" not in answer.headers
        assert client.get("/v1/tenants/beta/adapters").status_code == 200
    with limited.client("acme") as tenant:  # one allowance, whoever uses it up
        assert tenant.get("/v1/tenants/acme").status_code == 429


def test_no_key_charges_nobody(limited: Limited) -> None:
    """Requests without a key do not use up a tenant's rate."""
    limited.set("acme", 2)
    for _ in range(5):
        assert httpx.get(limited.url + ADAPTERS).status_code == 401
    with limited.client("acme") as client:
        assert client.get(ADAPTERS).headers["ratelimit"] == '"tenant";r=1;t=1'


def test_an_upload_above_the_rate_is_refused_before_its_body(limited: Limited) -> None:
    """The service answers 429 before the client has sent a byte of the body."""
    limited.set("acme", 1)
    key = f"Bearer {limited.keys['acme']}"
    with limited.client("acme") as client:
        assert client.get(ADAPTERS).status_code == 200
    address = httpx.URL(limited.url)
    with socket.create_connection((address.host, address.port), timeout=60) as connection:
        fields = {"Content_Type": "multipart/form-data; boundary=x", "Content_Length": "1000"}
        connection.sendall(head("POST", f"{ADAPTERS}/a/versions", Authorization=key, **fields))
        assert read_answer(connection).status == 429


def test_not_modified_tells_it_too(limited: Limited) -> None:
    """An answer that is sent without a route's response object, such as 304, has the fields too."""
    limited.set("acme", 50)
    with limited.client("acme") as client:
        etag = client.get(f"{ADAPTERS}/a/prefix").headers["etag"]
        answer = client.get(f"{ADAPTERS}/a/prefix", headers={"If-None-Match": etag})
    assert answer.status_code == 304
    assert answer.headers["ratelimit"] == '"tenant";r=48;t=1'


def test_threads_do_not_exceed_it(limited: Limited) -> None:
    """Sixteen clients in parallel together get what one would."""
    limited.set("acme", 20)
    clients = [limited.client("acme") for _ in range(16)]
    for client in clients:
        client.get("/livez")
    with ThreadPoolExecutor(16) as pool:
        statuses = [
            status
            for many in pool.map(lambda c: [c.get(ADAPTERS).status_code for _ in range(5)], clients)
            for status in many
        ]
    for client in clients:
        client.close()
    assert (statuses.count(200), statuses.count(429)) == (20, 60)


def test_a_rate_is_remembered_and_forgotten(limited: Limited) -> None:
    """A rate is looked up once, again after a change, and each time while changes are not heard."""
    limited.set("acme", 100)
    with limited.client("acme") as client:
        limited.asked.clear()
        _burst(client, ADAPTERS, 10)
        assert limited.asked == ["acme"]
        limited.rates["acme"] = 50
        assert client.get(ADAPTERS).headers["ratelimit-policy"] == '"tenant";q=100;w=1'
        limited.forget("acme")
        assert client.get(ADAPTERS).headers["ratelimit-policy"] == '"tenant";q=50;w=1'
        limited.rates["acme"], limited.are_known = 10, False
        assert client.get(ADAPTERS).headers["ratelimit-policy"] == '"tenant";q=10;w=1'
        limited.are_known = True


def test_the_client_comes_back_when_told(limited: Limited, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client waits as `Retry-After` says, and raises if its deadline is nearer."""
    waited: list[float] = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        limited.clock.pass_by(seconds)

    monkeypatch.setattr(transport, "time", SimpleNamespace(monotonic=time.monotonic, sleep=sleep))
    limited.set("acme", 3)
    with PrefixClient(limited.url, api_key=limited.keys["acme"]) as client, limited.client("acme") as other:
        statuses = {answer.status_code for answer in _burst(other, ADAPTERS, 6)}
        assert statuses == {200, 429}
        assert client.get("acme/a").attention_mask.shape == (1, 3)
        assert waited == [1]
    limited.set("acme", 1)
    with PrefixClient(limited.url, api_key=limited.keys["acme"], timeout=0.95) as client:
        with limited.client("acme") as other:
            _burst(other, ADAPTERS, 2)
        with pytest.raises(RateLimited, match="may send 1 requests a second") as raised:
            client.get("acme/a")
        assert raised.value.retry_after == 1


def test_made_up_tenants_take_bounded_memory() -> None:
    """The remembered rates and the windows are bounded, however many tenants a platform's key names."""

    async def rate_of(tenant: str) -> int | None:
        return {"acme": 5}.get(tenant)

    limits = RateLimits(rate_of, lambda: True)

    async def ask() -> None:
        for number in range(10_100):
            assert await limits.charge(f"t{number}") is None
        assert await limits.charge("acme") is not None

    asyncio.run(ask())
    assert len(limits._known) == 10_000
    assert "acme" in limits._known


def test_a_catalog_that_fails_is_told(tmp_path: Path) -> None:
    """If the rate cannot be read, the request is refused as unavailable, not let through."""
    settings = Settings(data_dir=tmp_path)
    with opened(settings), keys_of(settings) as (keyring, _):
        key = keyring.create(None, "admin", "", COMMAND_LINE)[1]

    async def fails(tenant: str) -> int | None:
        raise StorageFailed(f"the catalog is gone, so is the rate of {tenant}")

    app = create_app(settings)
    with served(app) as url:
        app.open(replace(app.state.prefix_service, rates=RateLimits(fails, lambda: True)))
        answer = httpx.get(url + ADAPTERS, headers={"Authorization": f"Bearer {key}"})
    problem(answer, 503, "storage-failed")


def test_it_is_an_unavailability_of_its_own_status() -> None:
    """RateLimited is an error of this service, and has the time to retry."""
    assert issubclass(RateLimited, PrefixServiceError)
    assert RateLimited("slow down", 3).retry_after == 3


def test_a_tenants_quota_is_its_rate(server: Server, admin: httpx.Client) -> None:
    """A real service takes the rate from the catalog; a change works immediately, and never locks operators out."""
    admin.put("/v1/tenants/rated", json={"requests_per_second": 2})
    own = server.client(admin.post("/v1/tenants/rated/keys", json={"scope": "read"}).json()["key"])
    answers = [own.get("/v1/tenants/rated") for _ in range(40)]
    refused = [answer for answer in answers if answer.status_code == 429]
    assert refused
    assert problem(refused[0], 429, "rate-limited")["detail"].startswith("tenant 'rated' may send 2 requests a second")
    assert (int(refused[0].headers["retry-after"]) >= 1, refused[0].headers["ratelimit-policy"]) == (
        True,
        '"tenant";q=2;w=1',
    )
    assert admin.put("/v1/tenants/rated", json={}).status_code == 200
    assert {own.get("/v1/tenants/rated").status_code for _ in range(20)} == {200}


def test_the_client_comes_again_when_it_may(server: Server, admin: httpx.Client) -> None:
    """A worker above its tenant's rate is slowed down, and no request of it fails."""
    upload(admin, "rated-client", "a")
    admin.put("/v1/tenants/rated-client", json={"requests_per_second": 3})
    key = admin.post("/v1/tenants/rated-client/keys", json={"scope": "read"}).json()["key"]
    began = time.monotonic()
    with PrefixClient(server.url, key) as client:
        for _ in range(9):
            assert client.get("rated-client/a").version == 1
    assert time.monotonic() - began > 1


async def test_replicas_share_a_rate() -> None:
    """Each grants its part, at least one request in a second, as soon as it knows how many there are."""

    async def rate_of(tenant: str) -> int | None:
        return {"acme": 10, "small": 1}.get(tenant)

    limits = RateLimits(rate_of, lambda: True)
    for replicas, acme, small in ((1, 10, 1), (3, 4, 1), (1, 10, 1)):
        limits.divide(replicas)
        for tenant, quota in (("acme", acme), ("small", small)):
            allowance = await limits.charge(tenant)
            assert allowance is not None
            assert allowance.quota == quota
            said = allowance.refusal(tenant).message
            assert ("to each of 3 replicas" in said) == (replicas == 3)
        assert await limits.charge("free") is None
