"""A client of several addresses: each adapter has one of them, and the next one answers where that is away or slow."""

import itertools
import socket
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

from prefix_service.client import PrefixClient
from prefix_service.client.protocol import Request
from prefix_service.client.transport import hedging, pools
from prefix_service.client.transport.connection import Connection
from prefix_service.client.transport.dialling import several
from prefix_service.client.transport.hedging import Hedging
from prefix_service.client.transport.pools import Pools, affinity, score
from prefix_service.errors import ConnectionFailed, InvalidRequest, InvalidResponse, Overloaded, Unavailable
from tests.client.conftest import LLAMA
from tests.client.forwarder import Forwarder, forwarders
from tests.client.hostile import BODY, answer, hostile_server, read_request
from tests.client.test_client import published
from tests.client.transport.test_deadlines import resolving
from tests.conftest import Server, free_port
from tests.processes import eventually

_names = itertools.count()
ADAPTERS = [f"pools/a{number}" for number in range(8)]
TENSORS = "Content-Type: application/vnd.safetensors"


@pytest.fixture(scope="module")
def adapters(server: Server) -> None:
    """Publishes the adapters."""
    with PrefixClient(server.url, server.admin_key) as client:
        for name in ADAPTERS:
            published(client, name)


@pytest.fixture
def fleet(server: Server, adapters: None) -> Iterator[list[Forwarder]]:
    """Yields three addresses of the service."""
    with forwarders(server.url, *[("127.0.0.1", 0)] * 3) as found:
        yield found


@pytest.fixture
def client(connect: Callable[..., Any], fleet: list[Forwarder]) -> Any:
    """Returns a client of either kind."""
    return connect(",".join(each.url for each in fleet))


@pytest.fixture
def unhedged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asks no other address because one is slow: on a slow machine all are."""
    monkeypatch.setattr(Hedging, "take", lambda _: False)
    monkeypatch.setattr(pools, "_CONNECTS", 60.0)


def best(key: str, names: list[str]) -> str:
    """Returns the address of a key."""
    return max(names, key=partial(score, key))


def home_of(adapter: str, fleet: list[Forwarder]) -> tuple[Forwarder, list[Forwarder]]:
    """Returns the address of an adapter, and the others, the next one first."""
    first, *others = sorted(fleet, key=lambda each: score(adapter, each.url), reverse=True)
    return first, others


def test_each_adapter_has_one_address(client: Any, fleet: list[Forwarder], unhedged: None) -> None:
    """All its versions and forms are asked for there, also those of a batch, and by writes."""
    for name in ADAPTERS:
        home, others = home_of(name, fleet)
        client.get(name)
        client.get(f"{name}@1", dtype="bfloat16")
        client.inspect(name)
        client.put_alias(name, "prod", 1)
        assert (home.taken(), [each.taken() for each in others]) == (4, [0, 0])
    client.clear_cache()
    client.get_many([*ADAPTERS, None])
    assert [each.taken() for each in fleet] == [
        sum(home_of(name, fleet)[0] is each for name in ADAPTERS) for each in fleet
    ]


def test_an_address_takes_only_its_own_adapters_along() -> None:
    """When one leaves, the adapters of the others stay; each has a fair part."""
    names = [f"http://{letter}:8080" for letter in "abcd"]
    keys = [f"acme/a{number}" for number in range(2000)]
    before, after = ({key: best(key, there) for key in keys} for there in (names, names[1:]))
    assert {before[key] for key in keys if before[key] != after[key]} == {names[0]}
    assert all(400 < list(before.values()).count(name) < 600 for name in names)


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ("/v1/tenants/acme/adapters/a@prod/prefix", "acme/a"),
        ("/v1/tenants/acme/adapters/a/versions", "acme/a"),
        ("/v1/tenants/acme/adapters/a", "acme/a"),
        ("/v1/tenants/acme/adapters", "/v1/tenants/acme/adapters"),
        ("/v1/whoami", "/v1/whoami"),
    ],
)
def test_the_key_is_tenant_and_adapter(path: str, key: str) -> None:
    """Without version and form; a request about no adapter is spread by its path."""
    assert affinity(path) == key


@pytest.mark.parametrize("how", ["refuses", "cuts"])
def test_the_next_address_answers_where_one_is_away(
    how: str, client: Any, fleet: list[Forwarder], monkeypatch: pytest.MonkeyPatch, unhedged: None
) -> None:
    """It is not asked again for a while, then by one read; once it answers, its adapters are back."""
    monkeypatch.setattr(pools, "_FIRST_ABSENCE", 1e9)
    monkeypatch.setattr(pools, "_LONGEST_ABSENCE", 1e9)
    name = ADAPTERS[0]
    home, (other, _) = home_of(name, fleet)
    client.inspect(name)
    home.taken()
    if how == "refuses":
        home.leave()
    else:
        home.become("cuts")
    for _ in range(3):
        client.inspect(name)
    assert other.taken() == 3
    assert home.taken() <= 2  # over a reused connection, and over a new one
    assert repr(getattr(client, "_client", client)).endswith(f"away=['{home.url}'])")
    if how == "refuses":
        home.listen()
    home.become("passes")
    monkeypatch.setattr(pools, "_FIRST_ABSENCE", 0.0)
    for place in _pools_of(client)._places:
        place.away_until = 0.0

    def is_back() -> bool:
        for _ in range(2):
            client.inspect(name)
        return (home.taken(), other.taken()) == (2, 0)

    eventually(is_back)  # a slow service may refuse a read at first


def _pools_of(client: Any) -> Any:
    return getattr(client, "_client", client)._pools


def test_an_address_that_was_away_is_tried_for_its_own_adapters() -> None:
    """By one read at a time. Reads that end at another address do not count as a try, and changes wait for one."""
    names = [f"http://127.0.0.1:{port}" for port in (1, 2, 3)]
    found = Pools({name: Connection(name) for name in names})
    own, other = (
        next(f"a/b{number}" for number in range(99) if (best(f"a/b{number}", names) == names[0]) is is_own)
        for is_own in (True, False)
    )
    place = found._places[0]
    place.fails()

    def first(adapter: str, method: str = "GET") -> str:
        tenant, name = adapter.split("/")
        chosen: str = found._order(Request(method, f"/v1/tenants/{tenant}/adapters/{name}"))[0].name
        return chosen

    assert first(own) != names[0]
    place.away_until = 0.0
    assert first(other) != names[0]
    assert first(own, "PUT") != names[0]
    assert first(own) == names[0]
    assert first(own) != names[0]
    place.begins()
    assert first(own, "PUT") == names[0]


def test_a_change_goes_to_an_address_that_is_there(client: Any, fleet: list[Forwarder]) -> None:
    """Nothing was sent to one that refused the connection."""
    home, _ = home_of(ADAPTERS[1], fleet)
    home.leave()
    assert client.compose(ADAPTERS[1], [f"{ADAPTERS[1]}@1", f"{ADAPTERS[2]}@1"])[0]["version"] == 2


def test_a_change_that_may_have_been_carried_out_is_not_repeated(client: Any, fleet: list[Forwarder]) -> None:
    """A composition whose connection was cut is an error, and no other address sees it."""
    home, others = home_of(ADAPTERS[3], fleet)
    home.become("cuts")
    with pytest.raises(ConnectionFailed):
        client.compose(ADAPTERS[3], [f"{ADAPTERS[3]}@1", f"{ADAPTERS[2]}@1"])
    assert [each.taken() for each in (home, *others)] == [1, 0, 0]
    assert client.inspect(ADAPTERS[3])["version"] == 1


def test_an_upload_is_repeated_elsewhere(client: Any, fleet: list[Forwarder]) -> None:
    """Its content names its version."""
    name = f"pools/upload{next(_names)}"
    home, others = home_of(name, fleet)
    home.become("cuts")
    assert client.publish(name, LLAMA)[1] is True
    assert sum(each.taken() for each in others) == 1


def test_a_slow_address_is_hedged(client: Any, fleet: list[Forwarder], monkeypatch: pytest.MonkeyPatch) -> None:
    """The next address is asked too, its answer is used, and the slow one counts as away."""
    name = ADAPTERS[4]
    home, (other, last) = home_of(name, fleet)
    monkeypatch.setattr(pools, "_CONNECTS", 60.0)
    home.become("hangs")
    assert client.get(name).version == 1
    monkeypatch.setattr(Hedging, "take", lambda _: False)  # the next address may seem slow too
    assert client.get(name).version == 1
    assert (home.taken(), other.taken(), last.taken()) == (1, 2, 0)
    home.become("passes")


def test_without_budget_a_silent_address_costs_part_of_the_deadline(
    connect: Callable[..., Any], fleet: list[Forwarder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next address is asked only then."""
    monkeypatch.setattr(hedging, "_MOST_SAVED", 0.0)
    client = connect([each.url for each in fleet], timeout=8)
    home, (other, _) = home_of(ADAPTERS[5], fleet)
    home.become("hangs")
    assert client.get(ADAPTERS[5]).version == 1
    assert (home.taken(), other.taken()) == (1, 1)
    home.become("passes")


def test_the_deadline_holds_over_all_addresses(
    connect: Callable[..., Any], fleet: list[Forwarder], two_attempts: None
) -> None:
    """Silent ones, and ones that refuse."""
    for mode in ("hangs", "cuts"):
        for each in fleet:
            each.become(mode)
        client = connect([each.url for each in fleet], timeout=0.5)
        with pytest.raises(ConnectionFailed):
            client.get(ADAPTERS[0])
    for each in fleet:
        each.leave()
    with pytest.raises(ConnectionFailed, match="refused"):
        connect([each.url for each in fleet], timeout=60).get(ADAPTERS[0])


def test_hedging_is_bounded_and_follows_the_answers() -> None:
    """One in twenty, after four; the delay lies above nearly all latencies."""
    found = Hedging()
    taken = 0
    for _ in range(1000):
        taken += found.take()
        found.observe(0.1)
    assert 50 <= taken <= 54
    assert 0.1 < found.delay < 0.2
    assert Hedging().delay == 1.0


def serving(status: int, *lines: str, body: bytes = b"") -> Callable[[socket.socket], None]:
    """Returns a script that gives every request one answer."""

    def script(connection: socket.socket) -> None:
        while read_request(connection):
            connection.sendall(answer(body, *lines, status=f"{status} X"))

    return script


PROBLEM = b'{"code": "overloaded", "detail": "full"}'


@pytest.mark.parametrize("by", ["proxy", "service"])
def test_a_503_is_asked_for_elsewhere(
    by: str, connect: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, two_attempts: None, unhedged: None
) -> None:
    """A read is; if all say so, it is an error. A service that says so itself is there."""
    lines = ("Content-Type: application/problem+json",) if by == "service" else ("Content-Type: text/html",)
    busy = serving(503, *lines, body=PROBLEM)
    with (
        hostile_server(busy) as one,
        hostile_server(busy) as two,
        hostile_server(serving(200, TENSORS, body=BODY)) as ok,
    ):
        monkeypatch.setattr(pools, "score", lambda _, name: [ok.url, two.url, one.url].index(name))
        client = connect([ok.url, one.url, two.url])
        for _ in range(2):
            client.clear_cache()
            assert client.get("a/b").version == 1
        assert _pools_of(client).away == ([] if by == "service" else [one.url, two.url])
        refused = connect([one.url, two.url], timeout=60)
        with pytest.raises(Overloaded if by == "service" else Unavailable, match=r"full|not reachable"):
            refused.get("a/b")


def test_addresses_of_other_catalogs_are_refused(unhedged: None) -> None:
    """Two services with folders of their own are no fleet."""
    one, two = (serving(200, TENSORS, f"Prefix-Catalog: {name}", body=BODY) for name in "ab")
    with hostile_server(one) as first, hostile_server(two) as second:
        home, other = sorted((first, second), key=lambda each: score("a/b", each.url), reverse=True)
        with PrefixClient([home.url, other.url], "k", verify_digest=False) as client:
            assert client.get("a/b").version == 1
            keys = (f"a/c{number}" for number in range(1000))
            elsewhere = next(key for key in keys if score(key, other.url) > score(key, home.url))
            with pytest.raises(InvalidResponse, match="services with data folders of their own") as found:
                client.get(elsewhere)
        assert other.url in str(found.value)


def test_a_name_with_several_addresses(
    connect: Callable[..., Any], server: Server, adapters: None, monkeypatch: pytest.MonkeyPatch, unhedged: None
) -> None:
    """They are spread over like given ones, and looked up again."""
    port = free_port()
    places = [("127.0.0.1", port), ("127.0.0.2", port)]
    with forwarders(server.url, *places) as fleet, resolving(monkeypatch, *places):
        client = connect(f"http://several.test:{port}")
        for name in ADAPTERS:
            for _ in range(2):
                client.inspect(name)
        counts = [each.taken() for each in fleet]
        wanted = [best(name, ["127.0.0.1", "127.0.0.2"]) for name in ADAPTERS]
        assert counts == [2 * wanted.count("127.0.0.1"), 2 * wanted.count("127.0.0.2")]
        fleet[1].leave()
        for name in ADAPTERS:
            client.inspect(name)
        assert fleet[0].taken() >= len(ADAPTERS)


def test_addresses_of_one_machine_are_one() -> None:
    """An IPv4 and an IPv6 address of a name, as localhost has them, are the same service."""
    v4, v6 = (socket.AF_INET, 1, 6, "", ("10.0.0.1", 80)), (socket.AF_INET6, 1, 6, "", ("::1", 80, 0, 0))
    other = (socket.AF_INET, 1, 6, "", ("10.0.0.2", 80))
    assert several([v6, v4]) == []
    assert several([v6, other, v4, v4]) == ["10.0.0.1", "10.0.0.2"]


def test_addresses_are_given_as_text_or_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    """One text has commas between them, `PREFIX_URL` too; the same one twice is one."""
    expected = "PrefixClient('http://a:1, https://b/x,y')"
    assert repr(PrefixClient("http://a:1, https://b/x,y")) == expected
    assert repr(PrefixClient(["http://a:1/", "https://b/x,y", "http://a:1"])) == expected
    monkeypatch.setenv("PREFIX_URL", "http://a:1,https://b/x,y")
    assert repr(PrefixClient()) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_url": []}, "name at least one"),
        ({"base_url": ["http://a", "ftp://b"]}, "must begin with http"),
        ({"base_url": ["http://a", 3]}, "must be a str"),
        ({"base_url": "http://a,http://b", "uds": "/s"}, "uds leads to one service"),
    ],
)
def test_addresses_that_cannot_be(options: dict[str, Any], message: str) -> None:
    """Each is an error of this project."""
    with pytest.raises(InvalidRequest, match=message):
        PrefixClient(**options)
