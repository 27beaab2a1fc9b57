"""`management.rollback`: an alias goes back to where it pointed before, or an error says why not."""

import itertools
from collections.abc import Generator
from typing import Any

import pytest

from prefix_service.client import PrefixClient
from prefix_service.client.flows import management
from prefix_service.client.protocol import Answer, Request
from prefix_service.errors import Forbidden, InvalidRequest, InvalidResponse, NotFound
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


def test_nothing_before(client: Any, adapter: str) -> None:
    """An alias that was only made, also again after a deletion; one that is not there; a version that is gone."""
    client.put_alias(adapter, "prod", 1)
    client.put_alias(adapter, "prod", 2)
    client.delete_alias(adapter, "prod")
    with pytest.raises(NotFound, match="no alias 'prod'"):
        client.rollback(adapter, "prod")
    client.put_alias(adapter, "prod", 2)
    with pytest.raises(NotFound, match=f"no version that {adapter}@prod named before 2"):
        client.rollback(adapter, "prod")
    client.put_alias(adapter, "prod", 3)
    client.delete(f"{adapter}@2")
    with pytest.raises(NotFound, match=f"there is no {adapter}@2"):
        client.rollback(adapter, "prod")
    assert client.aliases(adapter) == {"prod": 3}
    with pytest.raises(InvalidRequest):
        client.rollback(f"{adapter}@1", "prod")


def test_whoever_may_move_an_alias_may_roll_it_back(server: Server, client: Any, adapter: str) -> None:
    """A key of scope `write`; one that only reads sees where the alias was, and cannot move it."""
    for number in (1, 2):
        client.put_alias(adapter, "prod", number)
    with PrefixClient(server.url, server.key("read", "rollback")) as reader, pytest.raises(Forbidden):
        reader.rollback(adapter, "prod")
    assert client.aliases(adapter) == {"prod": 2}
    with PrefixClient(server.url, server.key("write", "rollback")) as writer:
        assert writer.rollback(adapter, "prod") == (1, 2)


def test_setting_an_alias_where_it_points_keeps_its_past(client: Any, adapter: str) -> None:
    """It is no move, so there is nothing else to go back to."""
    for number in (1, 2, 2):
        client.put_alias(adapter, "prod", number)
    assert client.rollback(adapter, "prod") == (1, 2)


def asked(flow: Generator[Any, Any, Any], *answers: str) -> list[Request]:
    """The requests of a flow that gets these answers; whatever it raises is raised."""
    kind = {"content-type": "application/json"}
    return [next(flow), *(flow.send(Answer(200, kind, bytearray(text.encode()))) for text in answers)]


def test_it_moves_only_what_it_has_seen() -> None:
    """The change is conditional; an answer without what it takes, as an older service's, moves nothing."""
    state = '{"alias": "prod", "version": 2, "previous": 1}'
    *_, change = asked(management.rollback("acme/a", "prod"), state)
    assert (change.method, change.headers, change.json) == (
        "PUT",
        {"If-Match": '"2"'},
        {"version": 1, "preload": False},
    )
    with pytest.raises(NotFound, match="no version that acme/a@prod named before 2"):
        asked(management.rollback("acme/a", "prod"), '{"alias": "prod", "version": 2}')
    for answer in ("{}", '{"version": "2"}', '{"version": 2, "previous": "1"}', '{"version": 2, "previous": 0}'):
        with pytest.raises(InvalidResponse):
            asked(management.rollback("acme/a", "prod"), answer)
