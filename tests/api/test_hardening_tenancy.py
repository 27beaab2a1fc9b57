"""No tenant learns anything about another."""

import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from tests.api.helpers import CONFIG, head, problem, read_answer, upload, weights
from tests.conftest import Server, running_server
from tests.processes import eventually


@pytest.fixture
def mine(server: Server, admin: httpx.Client) -> Iterator[httpx.Client]:
    """Yields a client with an admin key of its own tenant; another tenant has the same adapter with other weights."""
    for tenant, seed in (("tenancy-mine", 1), ("tenancy-other", 2)):
        assert upload(admin, tenant, "a", file=weights(seed)).status_code in (200, 201)
    key = admin.post("/v1/tenants/tenancy-mine/keys", json={"scope": "admin"}).json()
    yield server.client(key["key"])
    admin.delete(f"/v1/tenants/tenancy-mine/keys/{key['id']}")


@pytest.mark.parametrize(
    "path", ["", "/adapters", "/adapters/a", "/adapters/a@1/prefix", "/adapters/a/versions", "/keys", "/audit"]
)
def test_hardening_30_what_is_anothers_is_missing(mine: httpx.Client, path: str) -> None:
    """Another tenant's adapter is 404, with the body of a missing adapter but for the name in it."""
    foreign = problem(mine.get(f"/v1/tenants/tenancy-other{path}"), 404, "not-found")
    missing = problem(mine.get(f"/v1/tenants/tenancy-none{path}"), 404, "not-found")
    assert {**foreign, "detail": foreign["detail"].replace("tenancy-other", "tenancy-none")} == missing


def test_hardening_31_what_is_remembered_is_told_apart(admin: httpx.Client, mine: httpx.Client) -> None:
    """Two tenants with the same adapter, number and options get their own bytes, cold, from memory, and after a version
    was replaced."""
    paths = [f"/v1/tenants/{tenant}/adapters/a@1/prefix" for tenant in ("tenancy-mine", "tenancy-other")]
    for _ in range(2):
        first, second = (admin.get(path) for path in paths)
        assert first.content != second.content
        assert first.headers["etag"] != second.headers["etag"]
    crossed = admin.get(paths[0], headers={"If-None-Match": second.headers["etag"]})
    assert (crossed.status_code, crossed.content) == (200, first.content)
    # The same content under a new number is another version: its metadata and its tag say so.
    admin.delete("/v1/tenants/tenancy-other/adapters/a")
    again = upload(admin, "tenancy-other", "a", file=weights(2)).json()
    renewed = admin.get("/v1/tenants/tenancy-other/adapters/a/prefix")
    assert renewed.headers["prefix-version"] == str(again["version"])
    assert renewed.headers["etag"] != second.headers["etag"]


def test_hardening_32_the_same_bytes_of_two_tenants(admin: httpx.Client, mine: httpx.Client) -> None:
    """An upload of content that another tenant has is like any other: it counts in full, does not reach the other's by
    its digest, and stays when the other's is deleted."""
    shared = weights(3)
    theirs = upload(admin, "tenancy-other", "shared", file=shared)
    detail = theirs.json()
    for selector in (detail["digest"], detail["weights"]):
        for path in ("prefix", "parameters"):
            problem(mine.get(f"/v1/tenants/tenancy-mine/adapters/shared@{selector}/{path}"), 404, "not-found")
    before = mine.get("/v1/tenants/tenancy-mine").json()["bytes"]
    own, new = (upload(mine, "tenancy-mine", name, file=file) for name, file in (("shared", shared), ("n", weights(4))))
    assert (own.status_code, own.headers.keys()) == (new.status_code, new.headers.keys()) == (201, new.headers.keys())
    size = own.json()["size"]
    after = mine.get("/v1/tenants/tenancy-mine").json()["bytes"]
    manifests = after - before - 2 * (size["weights"] + size["key_values"])
    assert 2 * 200 < manifests < 2 * 2000
    admin.delete("/v1/tenants/tenancy-other/adapters/shared")
    assert mine.get("/v1/tenants/tenancy-mine/adapters/shared/parameters").content == shared
    for name in ("shared", "n"):
        mine.delete(f"/v1/tenants/tenancy-mine/adapters/{name}")


def test_hardening_33_a_body_is_not_read_before_the_key(server: Server) -> None:
    """Without a key the answer comes before the body; `test_auth` tries every route and kind of key."""
    address = urlsplit(server.url)
    request = head(
        "POST", "/v1/tenants/tenancy-mine/adapters/a/versions", Content_Type="multipart/form-data; boundary=x",
        Content_Length=str(1 << 30),
    )  # fmt: skip
    with socket.create_connection((address.hostname, address.port), timeout=60) as connection:
        connection.sendall(request)
        assert read_answer(connection).status == 401


def test_hardening_34_a_revoked_key_ends_on_every_process(tmp_path: Path) -> None:
    """A revoked key is soon refused by every process."""
    with running_server(tmp_path / "data", "--workers", "2") as server:
        admin = server.client()
        upload(admin, "acme", "a", CONFIG)
        made = admin.post("/v1/tenants/acme/keys", json={"scope": "read"}).json()
        reader = server.client(made["key"])

        def statuses() -> set[int]:
            # A new connection each time, so that both processes are asked.
            return {reader.get("/v1/tenants/acme", headers={"Connection": "close"}).status_code for _ in range(20)}

        assert statuses() == {200}
        assert admin.delete(f"/v1/tenants/acme/keys/{made['id']}").status_code == 204
        eventually(lambda: statuses() == {401})


def test_hardening_34_two_keys_are_valid_while_one_replaces_the_other(admin: httpx.Client, server: Server) -> None:
    """A new key works before the old one is revoked, so keys are rotated without a gap."""
    admin.put("/v1/tenants/tenancy-mine")
    old, new = (admin.post("/v1/tenants/tenancy-mine/keys", json={"scope": "read"}).json() for _ in range(2))
    clients = [server.client(key["key"]) for key in (old, new)]
    assert [client.get("/v1/tenants/tenancy-mine").status_code for client in clients] == [200, 200]
    admin.delete(f"/v1/tenants/tenancy-mine/keys/{old['id']}")
    assert [client.get("/v1/tenants/tenancy-mine").status_code for client in clients] == [401, 200]
