"""A client reads its own writes, whichever process of the service answers."""

import time
from typing import Any

import httpx
import pytest

from prefix_service.client import PrefixClient, service_state
from prefix_service.client.protocol import Request
from prefix_service.client.service_state import ServiceState
from tests.client.conftest import Counting
from tests.client.hostile import answer, hostile_server, says
from tests.client.test_client import published
from tests.conftest import Server

WRITE, READ = Request("PUT", "/v1/tenants/a"), Request("GET", "/v1/tenants/a")


def noted(state: ServiceState, revision: str, began: float, request: Request = WRITE) -> tuple[str, ...]:
    """Notes an answer, and returns what later requests ask for."""
    state.note_answer("http://a", request, {"prefix-revision": revision}, began)
    return state.needed


def test_requests_ask_for_the_revision_of_the_latest_write(connect: Any) -> None:
    """Also writes, so that their own revision is a later one; a client that never wrote asks for none."""
    tenants = answer(b"{}", "Content-Type: application/json", "Prefix-Revision: one")
    scripts = [says(answer(b"{}", "Content-Type: application/json", "Prefix-Revision: none")), *[says(tenants)] * 3]
    with hostile_server(*scripts) as server:
        client = connect(server.url)
        for call in (client.tenant, client.put_tenant, client.tenant, client.put_tenant):
            call("a")
        found = [b"".join(each) for each in server.requests]
    assert [b"\r\nPrefix-Min-Revision: one\r\n" in each for each in found] == [False, False, True, True]
    assert b"Min-Revision" not in found[0] + found[1]


def test_overlapping_writes_are_all_asked_for() -> None:
    """Revisions are opaque: that of the answer that came last may be the earlier one."""
    state, first = ServiceState(), time.monotonic()
    assert noted(state, "a", first) == ("a",)
    assert noted(state, "b", first) == ("a", "b")
    assert noted(state, "c", time.monotonic()) == ("c",)
    assert noted(state, "d", first, READ) == ("c",)
    for count in range(100):
        noted(state, f"{count}", 0)
    assert state.needed == tuple(f"{count}" for count in range(92, 100))


@pytest.mark.parametrize("text", ["", "a b", "x\u00e9", "x" * 300])
def test_only_a_revision_is_repeated(text: str) -> None:
    """Other text of a server never reaches a header."""
    assert noted(ServiceState(), text, 0) == ()


def test_a_revision_is_asked_for_until_all_know_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A minute later no process can be behind."""
    state = ServiceState()
    noted(state, "a", 0)
    monkeypatch.setattr(service_state, "_SETTLED", -1.0)
    assert state.needed == ()


class Heads(Counting):
    """Remembers which revision each request asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str | None] = []

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Passes a request on."""
        self.asked.append(request.headers.get("Prefix-Min-Revision"))
        return super().handle_request(request)


def test_the_service_accepts_its_revisions(server: Server) -> None:
    """Of a write of the platform, and of one of a tenant's key."""
    with PrefixClient(server.url, server.admin_key) as client:
        published(client, "revisions/a")
    for key in (server.admin_key, server.key("write", "revisions")):
        through = Heads()
        with PrefixClient(server.url, key, http=through) as client:
            client.get("revisions/a")
            client.put_alias("revisions/a", "prod", 1)
            assert client.get("revisions/a@prod").version == 1
            client.inspect("revisions/a")
        assert through.asked[:2] == [None, None]
        assert through.asked[2] is not None
        assert len(set(through.asked[2:])) == 1
