"""`management.rollback`: where an alias pointed before, from the audit log, or an error."""

import itertools
from collections.abc import Generator
from typing import Any

import pytest

from prefix_service.client import PrefixClient
from prefix_service.client.flows import management
from prefix_service.client.protocol import Answer, Request
from prefix_service.errors import Forbidden, InvalidRequest, InvalidResponse, NotFound, PreconditionFailed
from tests.client.conftest import GPT2, LLAMA
from tests.client.test_client import published
from tests.conftest import CORPUS, Server

_names = itertools.count()


@pytest.fixture
def adapter(client: Any) -> str:
    """An adapter of its own with the versions 1, 2 and 3."""
    name = f"rollback/a{next(_names)}"
    for folder in (LLAMA, GPT2, CORPUS / "cases" / "llama-n20-proj" / "adapter"):
        published(client, name, folder)
    return name


def test_an_alias_goes_back_to_where_it_was(client: Any, adapter: str) -> None:
    """To the version before the last move, not to the next smaller number; twice is where it began."""
    for number in (1, 3, 2):
        client.put_alias(adapter, "prod", number)
    client.put_alias(adapter, "other", 1)
    assert client.rollback(adapter, "prod") == (3, 2)
    assert client.aliases(adapter) == {"other": 1, "prod": 3}
    assert client.rollback(adapter, "prod") == (2, 3)
    assert client.aliases(adapter) == {"other": 1, "prod": 2}


def test_the_move_may_be_far_back(client: Any, adapter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind the latest changes of the tenant, which are read first."""
    for number in (1, 3):
        client.put_alias(adapter, "prod", number)
    for number in (1, 2, 1, 2):
        client.put_alias(adapter, "busy", number)
    monkeypatch.setattr(management, "_LATEST", 2)
    assert client.rollback(adapter, "prod") == (1, 3)


def test_nothing_before(client: Any, adapter: str) -> None:
    """An alias that was only made, also again after a deletion; one that is not there; a version that is gone."""
    client.put_alias(adapter, "prod", 1)
    client.put_alias(adapter, "prod", 2)
    client.delete_alias(adapter, "prod")
    with pytest.raises(NotFound, match="no alias 'prod'"):
        client.rollback(adapter, "prod")
    client.put_alias(adapter, "prod", 2)
    with pytest.raises(NotFound, match="since it was made, and nothing before"):
        client.rollback(adapter, "prod")
    client.put_alias(adapter, "prod", 3)
    client.delete(f"{adapter}@2")
    with pytest.raises(NotFound, match=f"there is no {adapter}@2"):
        client.rollback(adapter, "prod")
    assert client.aliases(adapter) == {"prod": 3}
    with pytest.raises(InvalidRequest):
        client.rollback(f"{adapter}@1", "prod")


def test_it_takes_a_key_that_reads_the_audit(server: Server, client: Any, adapter: str) -> None:
    """A writer may move an alias, and cannot learn where it was; nothing is moved then."""
    for number in (1, 2):
        client.put_alias(adapter, "prod", number)
    with PrefixClient(server.url, server.key("write", "rollback")) as writer, pytest.raises(Forbidden):
        writer.rollback(adapter, "prod")
    assert client.aliases(adapter) == {"prod": 2}
    with PrefixClient(server.url, server.key("admin", "rollback")) as admin:
        assert admin.rollback(adapter, "prod") == (1, 2)


def asked(flow: Generator[Any, Any, Any], *answers: str) -> list[Request]:
    """The requests of a flow that gets these answers; whatever it raises is raised."""
    kind = {"content-type": "application/json"}
    return [next(flow), *(flow.send(Answer(200, kind, bytearray(text.encode()))) for text in answers)]


def audit(details: str) -> str:
    """A page of the audit with another change, and one move of the alias."""
    entry = '{"action": "alias.moved", "target": "acme/a@%s", "details": %s}'
    moves = [entry % ("old", '{"version": 7, "before": 1}'), entry % ("prod", details)]
    return f'{{"items": [{", ".join(moves)}], "next": null}}'


def test_it_moves_only_what_it_has_seen() -> None:
    """The change is conditional; what the audit does not say, or says of another version, moves nothing."""
    current = '{"alias": "prod", "version": 2}'
    *_, change = asked(management.rollback("acme/a", "prod"), current, audit('{"version": 2, "before": 1}'))
    assert (change.method, change.headers, change.json) == (
        "PUT",
        {"If-Match": '"2"'},
        {"version": 1, "preload": False},
    )
    with pytest.raises(PreconditionFailed, match="moved meanwhile"):
        asked(management.rollback("acme/a", "prod"), current, audit('{"version": 3, "before": 1}'))
    with pytest.raises(NotFound, match="no longer says what acme/a@prod named before version 2"):
        asked(management.rollback("acme/a", "prod"), current, '{"items": [], "next": null}')
    for details in (
        "null",
        "[]",
        "{}",
        '{"version": "2"}',
        '{"version": 2, "before": "1"}',
        '{"version": 2, "before": 0}',
    ):
        with pytest.raises(InvalidResponse):
            asked(management.rollback("acme/a", "prod"), current, audit(details))
