"""Tenants have quotas, usage and deletion over HTTP."""

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import rfc8785

from prefix_service.prefix.config import parse_config
from tests.api.helpers import CONFIG, problem, upload, versions_path, weights
from tests.conftest import Server
from tests.processes import eventually

MANIFEST = rfc8785.dumps({"format": 1, "config": parse_config(CONFIG).model_dump(), "weights": f"sha256:{'0' * 64}"})
# One version takes this: its weights file, keys and values, manifest, and config file, if one was uploaded.
FRESH_SIZE = len(weights()) + 3 * 32 * 4 + len(MANIFEST)
SIZE = FRESH_SIZE + len(json.dumps(CONFIG))


@pytest.fixture
def tenant(request: pytest.FixtureRequest, admin: httpx.Client) -> str:
    """Returns a tenant of this test's own."""
    name = f"tenants-{abs(hash(request.node.name)) % 10**9}"
    assert admin.put(f"/v1/tenants/{name}").status_code == 201
    return name


def put(admin: httpx.Client, tenant: str, **quotas: Any) -> httpx.Response:
    return admin.put(f"/v1/tenants/{tenant}", json=quotas)


def told(admin: httpx.Client, tenant: str) -> dict[str, Any]:
    found: dict[str, Any] = admin.get(f"/v1/tenants/{tenant}").json()
    return found


def test_a_tenant_is_made_and_told(admin: httpx.Client) -> None:
    """PUT answers 201 once, then 200; without a body a new tenant has no limits, and an existing one keeps its own."""
    first = put(admin, "tenants-made", max_adapters=3, max_bytes=1 << 40, requests_per_second=100)
    assert first.status_code == 201
    quotas = {"max_adapters": 3, "max_bytes": 1 << 40, "requests_per_second": 100}
    assert first.json() == {"tenant": "tenants-made", "created": first.json()["created"], **quotas} | {
        "adapters": 0,
        "bytes": 0,
        "uncollected": 0,
    }
    again = admin.put("/v1/tenants/tenants-made")
    assert (again.status_code, again.json()) == (200, first.json())
    assert told(admin, "tenants-made") == first.json()
    other = admin.put("/v1/tenants/tenants-plain").json()
    assert [other[quota] for quota in quotas] == [None, None, None]


def test_a_body_sets_all_quotas(admin: httpx.Client, tenant: str) -> None:
    """A quota that the body leaves out is lifted."""
    put(admin, tenant, max_adapters=3, max_bytes=4)
    assert put(admin, tenant, max_bytes=5).status_code == 200
    found = told(admin, tenant)
    assert (found["max_adapters"], found["max_bytes"]) == (None, 5)
    put(admin, tenant)
    assert told(admin, tenant)["max_bytes"] is None


@pytest.mark.parametrize(
    "quotas",
    [
        {"max_adapters": -1},
        {"max_adapters": 1.5},
        {"max_adapters": True},
        {"max_bytes": "10"},
        {"max_bytes": 1 << 63},
        {"requests_per_second": 0},
        {"requests_per_second": 1 << 31},
        {"max_requests": 1},
    ],
    ids=str,
)
def test_quotas_that_are_malformed(admin: httpx.Client, quotas: dict[str, Any]) -> None:
    """A 422 names the field, and no tenant is made."""
    body = problem(put(admin, "tenants-never", **quotas), 422, "invalid-request")
    assert next(iter(quotas)) in body["detail"]
    problem(admin.get("/v1/tenants/tenants-never"), 404)


@pytest.mark.parametrize("content", [b"[]", b"{", b"null", b"\xff"])
def test_bodies_that_are_no_object(admin: httpx.Client, content: bytes) -> None:
    """A body that is no object is a 422."""
    headers = {"Content-Type": "application/json"}
    problem(admin.put("/v1/tenants/tenants-never", content=content, headers=headers), 422, "invalid-request")


def test_usage_is_told(admin: httpx.Client, tenant: str) -> None:
    """Usage counts adapters and all versions' bytes, whoever else has them; a deletion gives both back immediately."""
    for name in ("a", "b"):
        assert upload(admin, tenant, name).status_code == 201
    assert upload(admin, tenant, "a", file=weights(1)).status_code == 201
    found = told(admin, tenant)
    assert (found["adapters"], found["bytes"]) == (2, 3 * SIZE)
    admin.delete(f"/v1/tenants/{tenant}/adapters/a")
    found = told(admin, tenant)
    assert (found["adapters"], found["bytes"]) == (1, SIZE)

    def is_listed() -> bool:
        listed = {item["tenant"]: item for item in admin.get("/v1/tenants?limit=1000").json()["items"]}
        return bool(listed[tenant] == told(admin, tenant))

    eventually(is_listed)  # the collector may remove rows between the two reads


def test_the_adapters_that_a_tenant_may_have(admin: httpx.Client, tenant: str) -> None:
    """One adapter too many is a 507 that says what to do; new versions of existing adapters are accepted."""
    put(admin, tenant, max_adapters=1)
    assert upload(admin, tenant, "a").status_code == 201
    body = problem(upload(admin, tenant, "b"), 507, "quota-exceeded")
    assert f"tenant {tenant!r} has 1 adapters and may have 1: delete one" in body["detail"]
    assert upload(admin, tenant, "a", file=weights(1)).status_code == 201
    problem(admin.get(f"/v1/tenants/{tenant}/adapters/b"), 404)
    admin.delete(f"/v1/tenants/{tenant}/adapters/a")
    assert upload(admin, tenant, "b").status_code == 201


def test_the_bytes_that_a_tenant_may_have(admin: httpx.Client, tenant: str) -> None:
    """The quota holds to the byte, and a full tenant can upload the same content again."""
    put(admin, tenant, max_bytes=2 * SIZE - 1)
    assert upload(admin, tenant, "a").status_code == 201
    body = problem(upload(admin, tenant, "a", file=weights(1)), 507, "quota-exceeded")
    assert f"has {SIZE} of {2 * SIZE - 1} bytes, and this version takes {SIZE}" in body["detail"]
    assert upload(admin, tenant, "a").status_code == 200
    put(admin, tenant, max_bytes=2 * SIZE)
    assert upload(admin, tenant, "a", file=weights(1)).status_code == 201
    assert told(admin, tenant)["bytes"] == 2 * SIZE


def test_an_untrained_prefix_counts_too(admin: httpx.Client, tenant: str) -> None:
    """An untrained prefix counts against both quotas."""
    put(admin, tenant, max_bytes=FRESH_SIZE - 1)
    fresh = {"config": CONFIG, "init_weights": "zero"}
    problem(admin.post(versions_path(tenant, "a"), json=fresh), 507, "quota-exceeded")
    put(admin, tenant, max_adapters=0)
    problem(admin.post(versions_path(tenant, "a"), json=fresh), 507, "quota-exceeded")


def test_uploads_at_once_do_not_exceed_a_quota(admin: httpx.Client, server: Server, tenant: str) -> None:
    """Parallel uploads stay within the quota, because the catalog counts in the transaction of the version."""
    put(admin, tenant, max_bytes=5 * SIZE, max_adapters=8)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda n: upload(server.client(), tenant, f"a{n}", file=weights(n)), range(16)))
    assert sorted(answer.status_code for answer in answers) == [201] * 5 + [507] * 11
    assert told(admin, tenant)["bytes"] == 5 * SIZE


def test_quotas_are_the_platforms(admin: httpx.Client, server: Server, tenant: str) -> None:
    """A tenant's admin reads its quotas, and cannot change them."""
    key = admin.post(f"/v1/tenants/{tenant}/keys", json={"scope": "admin"}).json()["key"]
    own = server.client(key)
    assert own.get(f"/v1/tenants/{tenant}").json()["max_adapters"] is None
    problem(put(own, tenant, max_adapters=9), 403, "forbidden")
    problem(own.delete(f"/v1/tenants/{tenant}"), 403, "forbidden")


def test_a_tenant_goes_with_all_it_has(admin: httpx.Client, server: Server, tenant: str) -> None:
    """A deleted tenant loses adapters, versions, aliases and keys; a namesake starts empty, but reuses no number."""
    upload(admin, tenant, "a")
    admin.put(f"/v1/tenants/{tenant}/adapters/a/aliases/prod", json={"version": 1})
    key = admin.post(f"/v1/tenants/{tenant}/keys", json={"scope": "read"}).json()["key"]
    own = server.client(key)
    assert own.get(f"/v1/tenants/{tenant}/adapters/a/prefix").status_code == 200
    assert admin.delete(f"/v1/tenants/{tenant}").status_code == 204
    problem(own.get(f"/v1/tenants/{tenant}/adapters/a/prefix"), 401, "unauthenticated")
    for path in ("", "/adapters", "/adapters/a", "/adapters/a/prefix", "/keys", "/audit"):
        problem(admin.get(f"/v1/tenants/{tenant}{path}"), 404, "not-found")
    problem(admin.delete(f"/v1/tenants/{tenant}"), 404, "not-found")
    assert upload(admin, tenant, "a").json()["version"] == 2
    assert admin.get(f"/v1/tenants/{tenant}/adapters/a").json()["aliases"] == []


def test_tenants_come_in_pages(admin: httpx.Client) -> None:
    """Tenants come in the order of their names, with a Link to the next page."""
    names = [f"tenants-page-{letter}" for letter in "abc"]
    for name in names:
        admin.put(f"/v1/tenants/{name}")
    found, path = [], "/v1/tenants?limit=2"
    while path:
        answer = admin.get(path)
        found += [item["tenant"] for item in answer.json()["items"]]
        path = answer.headers.get("link", "").partition(">")[0].removeprefix("<")
    assert found == sorted(found)
    assert set(names) <= set(found)
