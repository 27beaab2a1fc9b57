"""A client that watches serves aliases and `latest` from memory, and has what they move to before it is asked for."""

import gc
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa

from prefix_service.catalog.schema import changes
from prefix_service.client import PrefixClient, Watch, WatchedChange
from prefix_service.client import watch as watch_module
from prefix_service.client.flows import watched
from prefix_service.client.flows.watched import Watched
from prefix_service.client.service_state import ServiceState
from prefix_service.errors import InvalidRequest, InvalidResponse, Unauthenticated
from tests.client.conftest import GPT2, Counting
from tests.client.forwarder import Forwarder, forwarders
from tests.client.hostile import answer, hostile_server, says
from tests.client.test_client import published
from tests.client.test_forks import in_child
from tests.conftest import Server

_names = itertools.count()


def until(holds: Callable[[], Any], what: str) -> Any:
    """Returns what a condition returns, once it holds."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if found := holds():
            return found
        time.sleep(0.01)
    raise AssertionError(f"waited in vain: {what}")


@pytest.fixture(scope="module")
def publisher(server: Server) -> Iterator[PrefixClient]:
    """Yields a client that changes things."""
    with PrefixClient(server.url, server.admin_key) as client:
        yield client


@pytest.fixture
def adapter(publisher: PrefixClient) -> str:
    """Publishes two versions of an adapter; `prod` is the first."""
    name = f"watch/a{next(_names)}"
    published(publisher, name)
    published(publisher, name, GPT2)
    publisher.put_alias(name, "prod", 1)
    return name


@pytest.fixture
def place(server: Server) -> Iterator[Forwarder]:
    """Yields an address of the service that counts requests."""
    with forwarders(server.url, ("127.0.0.1", 0)) as (found,):
        yield found


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the watch wait for what it fetches in advance, which takes a slow machine longer than a second."""
    monkeypatch.setattr(watch_module, "_PREFETCHED_WITHIN", 60.0)


def prefixes_asked(place: Forwarder) -> list[bytes]:
    """Returns the requests for prefixes since the last call."""
    heads, place.heads = place.heads, []
    return [head for head in heads if b"/prefix?" in head]


def watching(client: Any, on_change: Callable[[WatchedChange], object] | None = None) -> Watch:
    """Returns a watch that is heard from."""
    watch: Watch = client.watch(on_change)
    until(lambda: watch.is_alive, "the watch is heard from")
    return watch


def test_an_alias_is_served_from_memory(
    connect: Any, place: Forwarder, adapter: str, publisher: PrefixClient, patient: None
) -> None:
    """While nothing changes there is no request. What it moves to is there before it is asked for, in each form."""
    client, seen = connect(place.url), list[WatchedChange]()
    watching(client, seen.append)
    forms: list[dict[str, Any]] = [{}, {"dtype": "bfloat16"}]
    for _ in range(3):
        assert [client.get(f"{adapter}@prod", **form).version for form in forms] == [1, 1]
    assert len(prefixes_asked(place)) == 2
    publisher.put_alias(adapter, "prod", 2)
    until(lambda: [change for change in seen if change.kind == "alias-moved"], "the change is reported")
    assert len(prefixes_asked(place)) == 2
    assert [client.get(f"{adapter}@prod", **form).version for form in forms] == [2, 2]
    assert prefixes_asked(place) == []
    tenant, name = adapter.split("/")
    digest = client.resolve(f"{adapter}@2").digest
    assert seen[-1] == WatchedChange("alias-moved", tenant, name, "prod", 2, digest)


def test_latest_and_deletions(
    connect: Any, place: Forwarder, adapter: str, publisher: PrefixClient, patient: None
) -> None:
    """A publication moves `latest`; a deletion makes it be asked for."""
    client, seen = connect(place.url), list[WatchedChange]()
    watching(client, seen.append)
    assert client.get(adapter).version == 2
    publisher.compose(adapter, [f"{adapter}@1", f"{adapter}@1"])
    until(lambda: seen and seen[-1].kind == "version-published", "the publication is reported")
    prefixes_asked(place)
    assert client.get(adapter).version == 3
    assert prefixes_asked(place) == []
    publisher.delete(f"{adapter}@3")
    until(lambda: seen[-1].kind == "version-deleted", "the deletion is reported")
    assert client.get(adapter).version == 2
    assert len(prefixes_asked(place)) == 1


def test_other_adapters_stay_confirmed(connect: Any, place: Forwarder, publisher: PrefixClient) -> None:
    """A change is about its adapter alone, and one of a whole tenant about all of them."""
    tenant = f"watch{next(_names)}"
    names = [f"{tenant}/a{number}" for number in range(2)]
    for name in names:
        published(publisher, name)
    client, seen = connect(place.url), list[WatchedChange]()
    watching(client, seen.append)
    for name in names:
        client.get(name)
    publisher.put_alias(names[0], "prod", 1)
    until(lambda: seen, "the change is reported")
    prefixes_asked(place)
    for name in names:
        client.get(name)
    assert [head.split(b" ")[1].split(b"@")[0] for head in prefixes_asked(place)] == [
        f"/v1/tenants/{tenant}/adapters/a0/prefix?layout=stacked&expand=false".encode()
    ]
    publisher.put_tenant(tenant, {"max_adapters": 9})
    until(lambda: seen[-1].kind == "quotas-changed", "the change is reported")
    for name in names:
        client.get(name)
    assert len(prefixes_asked(place)) == 2


def test_a_client_sees_its_own_writes(connect: Any, place: Forwarder, adapter: str, publisher: PrefixClient) -> None:
    """Also before its watch has told of them: here it is held up by another change."""
    client, is_held, may_go_on = connect(place.url), threading.Event(), threading.Event()

    def hold(_change: WatchedChange) -> None:
        is_held.set()
        may_go_on.wait(60)

    watching(client, hold)
    publisher.put_alias(adapter, "dev", 1)
    assert is_held.wait(60)
    for version in (1, 2, 1, 2):
        client.put_alias(adapter, "prod", version)
        assert client.get(f"{adapter}@prod").version == version
    may_go_on.set()


def test_a_silent_watch_confirms_nothing(
    connect: Any, place: Forwarder, adapter: str, publisher: PrefixClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each get is a request until the watch is heard from, and what was cached before is asked for once."""
    client = connect(place.url)
    watch = watching(client)
    state = getattr(client, "_client", client)._reading.watched
    client.get(f"{adapter}@prod")
    prefixes_asked(place)
    hear = state.hear
    monkeypatch.setattr(state, "hear", lambda _: None)  # the service may send a sign of life at any moment
    state._told_until = 0.0
    assert not watch.is_alive
    for _ in range(2):
        client.get(f"{adapter}@prod")
    assert len(prefixes_asked(place)) == 2
    hear(state._service.watched)
    for _ in range(2):
        client.get(f"{adapter}@prod")
    assert len(prefixes_asked(place)) == 1


def test_a_lost_connection_is_made_again(connect: Any, place: Forwarder, adapter: str, publisher: PrefixClient) -> None:
    """The watch goes on where it was; meanwhile aliases are asked for."""
    client, seen = connect(place.url), list[WatchedChange]()
    watch = watching(client, seen.append)
    client.get(f"{adapter}@prod")
    place.leave()
    until(lambda: not watch.is_alive, "the loss is noticed")
    publisher.put_alias(adapter, "prod", 2)
    place.become("passes")
    place.listen()
    until(lambda: [change for change in seen if change.kind == "alias-moved"], "the change is reported")
    until(lambda: watch.is_alive, "the watch is heard from")
    assert client.get(f"{adapter}@prod").version == 2


def test_missed_changes_are_reported(
    connect: Any, place: Forwarder, adapter: str, publisher: PrefixClient, server: Server
) -> None:
    """If the service keeps them no longer, everything is asked for again."""
    client, seen = connect(place.url), list[WatchedChange]()
    watch = watching(client, seen.append)
    client.get(f"{adapter}@prod")
    place.leave()
    for version in (2, 1, 2):
        publisher.put_alias(adapter, "prod", version)
    with server.writing() as catalog:
        latest = sa.select(sa.func.max(changes.c.revision)).scalar_subquery()
        catalog.execute(sa.delete(changes).where(changes.c.revision < latest))
    place.become("passes")
    place.listen()
    until(lambda: seen, "the watch has begun again")
    assert seen[0] == WatchedChange("everything-changed")
    until(lambda: watch.is_alive, "the watch is heard from")
    assert client.get(f"{adapter}@prod").version == 2


def test_a_revoked_key_ends_the_watch(publisher: PrefixClient, place: Forwarder, adapter: str) -> None:
    """With the error that a call gets; another watch may begin, and a failing function does not end one."""
    made = publisher.create_key("read", "watch")
    with PrefixClient(place.url, made["key"]) as client:
        watch = watching(client, lambda _: 1 / 0)
        publisher.put_alias(adapter, "dev", 1)
        client.get(f"{adapter}@prod")
        with pytest.raises(InvalidRequest, match="watches changes already"):
            client.watch()
        publisher.revoke_key(made["id"], "watch")
        assert isinstance(until(lambda: watch.error, "the watch has ended"), Unauthenticated)
        assert not watch.is_alive
        with pytest.raises(Unauthenticated):
            client.get(f"{adapter}@prod")
        client.watch().close()


def test_the_client_ends_its_watch(connect: Any, place: Forwarder) -> None:
    """No thread is left."""
    client = connect(place.url)
    watch = watching(client)
    client.close()
    assert not watch._thread.is_alive()
    assert not watch.is_alive
    assert watch.error is None


def test_a_client_that_is_forgotten_ends_its_watch() -> None:
    """Nobody can close it any more."""
    with hostile_server(says()) as silent:
        client = PrefixClient(silent.url)
        watch = client.watch()
        del client
        gc.collect()
        until(lambda: not watch._thread.is_alive(), "the thread has ended")


def test_a_watch_in_a_forked_child(place: Forwarder, adapter: str, publisher: PrefixClient, server: Server) -> None:
    """It begins there when the client is used, and until then confirms nothing."""
    with PrefixClient(place.url, server.admin_key) as client:
        watch = watching(client)
        client.get(f"{adapter}@prod")

        def work() -> None:
            assert os.getpid() != parent
            assert not watch.is_alive
            assert client.get(f"{adapter}@prod").version == 1
            until(lambda: watch.is_alive, "the child's watch is heard from")
            client.get(f"{adapter}@prod")

        parent = os.getpid()
        in_child(work)
        assert watch.is_alive


@pytest.mark.parametrize(
    ("body", "lines"),
    [
        (b"{}", ["Content-Type: application/json"]),
        (b"id: a\ndata: {\n\n", ["Content-Type: text/event-stream"]),
        (b'id: a\ndata: {"kind": 3}\n\n', ["Content-Type: text/event-stream"]),
        (b'id: a\ndata: {"kind": "a", "version": "1"}\n\n', ["Content-Type: text/event-stream"]),
        (b"x" * (2 << 20), ["Content-Type: text/event-stream"]),
    ],
)
def test_what_is_no_stream_of_changes_ends_the_watch(body: bytes, lines: list[str]) -> None:
    """With an error of this project."""
    with hostile_server(says(answer(body, *lines))) as there, PrefixClient(there.url, "k") as client:
        watch = client.watch()
        assert isinstance(until(lambda: watch.error, "the watch has ended"), InvalidResponse)


def test_a_transport_of_the_callers_own_cannot_watch(server: Server) -> None:
    """Its connections may belong to an event loop."""
    with (
        PrefixClient(server.url, "k", http=Counting()) as client,
        pytest.raises(InvalidRequest, match="leave out http"),
    ):
        client.watch()
    with PrefixClient(server.url, "k") as client, pytest.raises(InvalidRequest, match="function of one change"):
        client.watch(3)  # type: ignore[arg-type]


def test_what_a_watch_remembers_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is forgotten is doubted: no answer is confirmed that an earlier change might be about."""
    monkeypatch.setattr(watched, "_MOST_CHANGED", 2)
    state = Watched(ServiceState())
    state.is_on = True
    state.hear("r")
    stamps = [state.stamp()]
    for name in "abc":
        state.apply(WatchedChange("alias-moved", "t", name), state.begin_change(name))
        stamps.append(state.stamp())
    assert [state.confirms("t", "z", stamp) for stamp in stamps] == [False, True, True, True]
    assert [state.confirms("t", "a", stamp) for stamp in stamps] == [False, True, True, True]
    assert [state.confirms("t", "c", stamp) for stamp in stamps] == [False, False, False, True]
    assert len(state._changed) == 2
