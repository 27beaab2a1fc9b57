"""Both clients manage aliases, deletion, residency, tenants, keys and audit, and retry only what they may."""

import asyncio
import itertools
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import httpx
import pytest

from prefix_service.checkpoints.sources import prepare_upload
from prefix_service.client import AsyncPrefixClient, PrefixClient
from prefix_service.errors import (
    Conflict,
    ConnectionFailed,
    Forbidden,
    InvalidReference,
    InvalidRequest,
    NotFound,
    PreconditionFailed,
    Unauthenticated,
)
from tests.client.conftest import GPT2, LLAMA, Awaited
from tests.client.test_client import published
from tests.conftest import Server

_names = itertools.count()


@pytest.fixture
def adapter(client: Any) -> str:
    """Returns an adapter of its own with the versions 1 and 2."""
    name = f"managed/a{next(_names)}"
    for folder in (LLAMA, GPT2):
        published(client, name, folder)
    return name


def test_an_alias_is_made_moved_and_forgotten(client: Any, adapter: str) -> None:
    """Each step says whether the alias is new, and the listing shows the version of each."""
    assert client.aliases(adapter) == {}
    assert client.put_alias(adapter, "prod", 1) is True
    assert client.put_alias(adapter, "prod", 2, preload=True) is False
    assert client.inspect(f"{adapter}@prod")["residency"]["resident"] is True
    client.put_alias(adapter, "old", 1)
    client.put_alias(adapter, "canary", 2)
    assert list(client.aliases(adapter).items()) == [("canary", 2), ("old", 1), ("prod", 2)]
    client.delete_alias(adapter, "old")
    assert client.aliases(adapter) == {"canary": 2, "prod": 2}


def test_card_and_annotations_are_published_read_and_replaced(client: Any) -> None:
    """They are replaced whole, and publishing an existing version keeps its own."""
    name = f"managed/a{next(_names)}"
    upload = prepare_upload(GPT2)
    with upload.weights as weights:
        described = {"card": "# É\n".encode(), "annotations": {"run": "17"}}
        client.publish_files(name, upload.config, weights, **described)
        weights.seek(0)
        client.publish_files(name, upload.config, weights, card=b"another")
    assert client.card(name) == "# É\n"
    assert client.annotations(f"{name}@1") == {"run": "17"}
    client.put_card(name, "new")
    client.put_annotations(name, {})
    assert client.card(name) == "new"
    assert client.annotations(name) == {}


def test_an_alias_moves_only_under_its_condition(client: Any, adapter: str) -> None:
    """`if_match` and `create_only` refuse an alias that somebody else changed, and each other."""
    client.put_alias(adapter, "prod", 1, create_only=True)
    with pytest.raises(PreconditionFailed):
        client.put_alias(adapter, "prod", 2, create_only=True)
    with pytest.raises(PreconditionFailed):
        client.put_alias(adapter, "prod", 2, if_match=2)
    assert client.aliases(adapter) == {"prod": 1}
    client.put_alias(adapter, "prod", 2, if_match=1)
    assert client.aliases(adapter) == {"prod": 2}
    with pytest.raises(InvalidRequest):
        client.put_alias(adapter, "prod", 2, if_match=1, create_only=True)


def test_a_version_or_the_whole_adapter_is_deleted(client: Any, adapter: str) -> None:
    """A version to which an alias points stays; an adapter is deleted with all it has."""
    client.put_alias(adapter, "prod", 2)
    with pytest.raises(Conflict):
        client.delete(f"{adapter}@2")
    client.delete(f"{adapter}@{client.inspect(f'{adapter}@1')['digest']}")
    with pytest.raises(NotFound):
        client.inspect(f"{adapter}@1")
    client.delete(adapter)
    with pytest.raises(NotFound):
        client.delete(adapter)


@pytest.mark.one_process("what is in memory is each replica's own")
def test_a_version_is_loaded_pinned_and_unloaded(client: Any, adapter: str) -> None:
    """The overview shows a pinned version and why it is there, until it is unloaded."""
    state = client.load(f"{adapter}@1", pinned=True)
    assert (state["resident"], state["pinned"]) == (True, True)

    def reasons() -> list[str]:
        tenant, name = adapter.split("/")
        found = client.residency(1000)
        assert {tier["name"] for tier in found["tiers"]} == {"device", "host"}
        return [one["reason"] for one in found["resident"] if (one["tenant"], one["adapter"]) == (tenant, name)]

    assert reasons() == ["pinned"]
    client.load(f"{adapter}@2")
    assert len(client.residency(1)["resident"]) == 1
    for number in (1, 2):
        client.unload(f"{adapter}@{number}")
    assert reasons() == []


def test_a_tenant_is_made_given_quotas_and_deleted(client: Any) -> None:
    """Quotas are set immediately, and stay if none are given."""
    name = f"hosted-{next(_names)}"
    item, is_new = client.put_tenant(name)
    assert (is_new, item["max_adapters"], item["adapters"]) == (True, None, 0)
    item, is_new = client.put_tenant(name, {"max_adapters": 7})
    assert (is_new, item["max_adapters"], item["max_bytes"]) == (False, 7, None)
    assert client.put_tenant(name)[0]["max_adapters"] == 7
    client.put_tenant(name, {"max_bytes": 1 << 40})
    assert client.tenant(name)["max_adapters"] is None
    assert name in [one["tenant"] for one in client.tenants()]
    client.delete_tenant(name)
    with pytest.raises(NotFound):
        client.tenant(name)


def test_the_audit_comes_newest_first_through_every_page(
    client: Any, adapter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The audit of a tenant or of the platform ends at the limit, even if that takes several pages."""
    for number in (1, 2, 1):
        client.put_alias(adapter, "prod", number)
    monkeypatch.setattr("prefix_service.client.flows.listing._PAGE", 2)
    latest = client.audit("managed", 3)
    assert [(one["action"], one["details"]["version"]) for one in latest] == [
        ("alias.moved", 1),
        ("alias.moved", 2),
        ("alias.moved", 1),
    ]
    assert client.audit(limit=3) == latest
    everything = client.audit("managed", 1000)
    assert len({one["id"] for one in everything}) == len(everything)
    assert [one["at"] for one in everything] == sorted((one["at"] for one in everything), reverse=True)
    assert everything[-1]["action"] == "tenant.created"


@pytest.mark.parametrize("tenant", ["keys-of", None])
def test_a_key_is_made_given_an_end_and_revoked(client: Any, server: Server, tenant: str | None) -> None:
    """A key's text comes once, and its end is in any time zone, or in UTC without one."""
    client.put_tenant("keys-of")
    week = datetime.now(timezone(timedelta(hours=9))) + timedelta(weeks=1)
    made = client.create_key("read", tenant, name="ci", expires=week)
    key_id, text = made["id"], made["key"]
    assert (made["tenant"], made["scope"], made["name"]) == (tenant, "read", "ci")
    assert datetime.fromisoformat(made["expires"]) == week
    assert client.key(key_id, tenant) == {name: made[name] for name in made if name != "key"}
    assert key_id in [one["id"] for one in client.keys(tenant)]
    day = datetime.now(UTC).replace(tzinfo=None) + timedelta(days=1)
    assert client.shorten_key(key_id, day, tenant)["expires"] == f"{day.isoformat()}Z"
    with pytest.raises(Conflict):
        client.shorten_key(key_id, week, tenant)
    with PrefixClient(server.url, text) as own:
        shown = {"id": key_id, "name": "ci", "tenant": tenant, "scope": "read", "expires": f"{day.isoformat()}Z"}
        assert own.whoami() == shown | {"max_upload_bytes": 2 << 30}
        client.revoke_key(key_id, tenant)
        with pytest.raises(Unauthenticated):
            own.whoami()
    with pytest.raises(NotFound):
        client.key(key_id, tenant)


@pytest.mark.parametrize(
    ("call", "error"),
    ids=[
        "alias of a version",
        "alias named as a number",
        "no tenant",
        "path in a tenant's name",
        "path in a key's id",
        "no id",
    ],
    argvalues=[
        (lambda client: client.put_alias("managed/a@1", "prod", 1), InvalidRequest),
        (lambda client: client.delete_alias("managed/a", "7"), InvalidReference),
        (lambda client: client.delete("a"), InvalidReference),
        (lambda client: client.tenant("../keys"), InvalidReference),
        (lambda client: client.revoke_key("../tenants/acme"), InvalidRequest),
        (lambda client: client.key(""), InvalidRequest),
    ],
)
def test_what_is_not_well_formed_never_leaves(call: Any, error: type[Exception]) -> None:
    """A malformed name raises before the first request."""
    with PrefixClient("http://127.0.0.1:1") as client, pytest.raises(error):
        call(client)


def test_a_tenants_key_does_not_manage_the_platform(server: Server) -> None:
    """A tenant's admin reads its own audit, but neither tenants nor residency."""
    with PrefixClient(server.url, server.key("admin", "customers")) as customer:
        assert customer.audit("customers")[-1]["action"] == "tenant.created"
        for forbidden in (customer.tenants, customer.residency, lambda: customer.put_tenant("customers", {})):
            with pytest.raises(Forbidden):
                forbidden()
        with pytest.raises(NotFound):
            customer.audit("managed")


class Forgetful(httpx.HTTPTransport):
    """httpx's own transport, which loses the first answer after the service did what it was asked."""

    has_lost = False

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Passes a request on."""
        response = super().handle_request(request)
        if not self.has_lost:
            response.read()
            self.has_lost = True
            raise httpx.ReadError("the answer is lost")
        return response


class AsyncForgetful(httpx.AsyncHTTPTransport):
    """An asyncio transport that loses the first answer after the service did what it was asked."""

    has_lost = False

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Passes a request on."""
        response = await super().handle_async_request(request)
        if not self.has_lost:
            await response.aread()
            self.has_lost = True
            raise httpx.ReadError("the answer is lost")
        return response


@pytest.fixture(params=["blocking", "async"])
def forgetful(request: pytest.FixtureRequest, server: Server) -> Iterator[Any]:
    """Yields a client of either kind that loses the first answer."""
    if request.param == "blocking":
        with PrefixClient(server.url, server.admin_key, http=Forgetful()) as blocking:
            yield blocking
        return
    loop = asyncio.new_event_loop()
    awaited = Awaited(AsyncPrefixClient(server.url, server.admin_key, http=AsyncForgetful()), loop)
    yield awaited
    awaited.close()
    loop.close()


@pytest.fixture
def direct(server: Server) -> Iterator[PrefixClient]:
    """Yields a client with nothing before the service."""
    with PrefixClient(server.url, server.admin_key) as client:
        yield client


def test_a_deletion_whose_answer_was_lost_is_done(forgetful: Any, direct: PrefixClient) -> None:
    """The client retries a deletion, and takes the 404 for success."""
    name = f"managed/lost{next(_names)}"
    published(direct, name)
    forgetful.delete(name)
    with pytest.raises(NotFound):
        direct.inspect(name)
    with pytest.raises(NotFound):
        forgetful.delete(name)


def test_a_plain_change_whose_answer_was_lost_is_made_again(forgetful: Any, direct: PrefixClient) -> None:
    """The client retries a change that twice is the same as once."""
    name = f"managed/again{next(_names)}"
    published(direct, name)
    forgetful.put_alias(name, "prod", 1)
    assert direct.aliases(name) == {"prod": 1}


def test_a_key_whose_answer_was_lost_is_not_made_again(forgetful: Any, direct: PrefixClient) -> None:
    """The client does not retry making a key, whose text is lost, and raises ConnectionFailed."""
    name = f"lost-key-{next(_names)}"
    direct.put_tenant(name)
    with pytest.raises(ConnectionFailed):
        forgetful.create_key("read", name)
    assert len(direct.keys(name)) == 1


def test_an_end_whose_answer_was_lost_is_given_again(forgetful: Any, direct: PrefixClient) -> None:
    """The client retries giving a key an end, which twice is the same as once."""
    made = direct.create_key("read")
    end = datetime.now(UTC) + timedelta(days=1)
    assert datetime.fromisoformat(forgetful.shorten_key(made["id"], end)["expires"]) == end


def test_a_composition_whose_answer_was_lost_is_not_made_again(forgetful: Any, direct: PrefixClient) -> None:
    """The client does not retry a composition, because its references may mean other versions by then."""
    name = f"managed/composed{next(_names)}"
    published(direct, f"{name}-part")
    with pytest.raises(ConnectionFailed):
        forgetful.compose(name, [f"{name}-part", f"{name}-part"])
    assert direct.inspect(name)["version"] == 1


def test_a_change_under_a_condition_whose_answer_was_lost_is_not_made_again(
    forgetful: Any, direct: PrefixClient
) -> None:
    """The client does not retry a conditional change, which its own first try would refuse."""
    name = f"managed/once{next(_names)}"
    published(direct, name)
    with pytest.raises(ConnectionFailed):
        forgetful.put_alias(name, "prod", 1, create_only=True)
    assert direct.aliases(name) == {"prod": 1}
