"""After `fork()`, and in processes that are started otherwise, a client gets no other adapter's tensors and does not
hang, and the parent goes on undisturbed.
"""

import asyncio
import gc
import multiprocessing
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from torch.utils.data import DataLoader

from prefix_service.client import AsyncPrefixClient, PrefixClient
from prefix_service.errors import InvalidRequest
from tests.client.hostile import answer, hostile_server, read_request, says
from tests.client.reading_workers import ADAPTERS, Reads, numbers_in, publish_numbered
from tests.client.transport.test_pool import is_right
from tests.client.transport.test_transport import tls_in_front_of
from tests.conftest import Server, running_server

pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),  # the TLS proxy's sockets
]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Yields a service on a Unix socket, with shared memory."""
    folder = tmp_path_factory.mktemp("forks")
    socket = folder / "s"
    environment = {"PREFIX_SHARED_DIR": str(folder / "shared")}
    with running_server(folder / "data", "--uds", str(socket), environment=environment, uds=socket) as running:
        with PrefixClient(running.url, running.admin_key, uds=socket) as client:
            publish_numbered(client, "forks")
        yield running


@pytest.fixture(scope="module")
def numbered(server: Server) -> Server:
    """Returns the service with the numbered adapters."""
    with PrefixClient(server.url, server.admin_key) as client:
        publish_numbered(client, "forks")
    return server


def in_child(work: Callable[[], Any]) -> Any:
    """Returns the result of `work` in a forked child, whose errors are raised here."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)

    def run() -> None:
        try:
            there.send(work())
        except BaseException as error:  # noqa: BLE001 - raised in the parent
            there.send(error)

    child = context.Process(target=run, daemon=True)
    child.start()
    try:
        assert here.poll(90), "the child hangs"
        result = here.recv()
    finally:
        child.kill()
        child.join()
    if isinstance(result, BaseException):
        raise result
    return result


WAYS: dict[str, dict[str, Any]] = {
    "tcp": {},
    "in memory": {"cache_bytes": 1 << 20},
    "digest": {"verify_digest": True},
    "ranges": {"connections": 2},
    "tls": {"tls": True},
    "uds": {"uds": True, "shared_memory": False},
    "shared memory": {"uds": True},
    "on disk": {"cache_dir": True},
}


@contextmanager
def client_on(way: str, kind: type[Any], numbered: Server, shared: Server, folder: Path) -> Iterator[Any]:
    """Yields a client that reaches the service that way."""
    options: dict[str, Any] = {"cache_bytes": 0, "timeout": 60, **WAYS[way]}
    with ExitStack() as stack:
        server = shared if options.pop("uds", False) else numbered
        url = server.url
        if server.uds is not None:
            options["uds"] = server.uds
        if options.pop("tls", False):
            url, options["ca_file"] = stack.enter_context(tls_in_front_of(url, folder))
        if options.get("cache_dir"):
            options["cache_dir"] = folder / "cache"
        yield stack.enter_context(closing(kind(url, server.admin_key, **options)))


@pytest.mark.parametrize("kind", [PrefixClient, AsyncPrefixClient])
@pytest.mark.parametrize("way", WAYS)
def test_children_of_a_used_client_read_what_they_ask_for(
    way: str, kind: type[Any], numbered: Server, shared: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four children and the parent read in parallel, and each gets the adapters that it asked for."""
    if way == "ranges":
        monkeypatch.setattr("prefix_service.client.transport.ranges.PIECE", 2048)
    with client_on(way, kind, numbered, shared, tmp_path) as client:
        reads = Reads(client, "forks", 18)
        assert all(found == [number] for number, found in reads)
        context = multiprocessing.get_context("fork")
        with context.Pool(4, initializer=_adopt, initargs=(reads,)) as pool:
            pending = pool.map_async(_read, range(4))
            ours = list(reads)
            theirs = [read for found in pending.get(120) for read in found]
        assert len(theirs) == 4 * 18
        assert [read for read in ours + theirs if read[1] != [read[0]]] == []
        if way == "on disk":
            assert all(found == [number] for number, found in reads)


_adopted: list[Reads] = []


def _adopt(reads: Reads) -> None:
    _adopted.append(reads)


def _read(_: int) -> list[tuple[int, list[float]]]:
    return list(_adopted[0])


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_a_data_loader_reads_what_it_asks_for(method: str, numbered: Server) -> None:
    """torch's workers read by a client that was used before, while the parent reads too."""
    wrong, stop = list[Any](), threading.Event()
    with PrefixClient(numbered.url, numbered.admin_key, cache_bytes=0) as client:
        reads = Reads(client, "forks")

        def go_on() -> None:
            while not stop.wait(0.02):  # seconds: the workers need the processor, too
                wrong.extend(read for read in Reads(client, "forks", ADAPTERS) if read[1] != [read[0]])

        reader = threading.Thread(target=go_on)
        reader.start()
        try:
            context = multiprocessing.get_context(method)
            if method == "forkserver":
                context.set_forkserver_preload(["tests.client.reading_workers"])  # torch is imported once
            workers = 2 if method == "spawn" else 4  # each imports torch, and shares nothing with the others
            loader = DataLoader(reads, batch_size=None, num_workers=workers, multiprocessing_context=context)
            found = list(loader)
        finally:
            stop.set()
            reader.join()
    assert len(found) == 64
    assert [read for read in found if read[1] != [read[0]]] == wrong == []


def test_a_child_opens_a_connection_of_its_own_and_leaves_the_parents_alone() -> None:
    """The parent's idle connection carries nothing of the child, stays open, and serves the parent's next call."""
    with hostile_server(says(*[answer()] * 3)) as server, PrefixClient(server.url, cache_bytes=0) as client:
        client.get("a/b@1")
        assert in_child(lambda: is_right(client.get("a/b")))
        assert is_right(client.get("a/b@1"))
    requests = [b"".join(each) for each in server.requests]
    assert [each.count(b"/b@1/") for each in requests] == [2, 0]
    assert [each.count(b"/b/") for each in requests] == [0, 1]


@pytest.mark.parametrize("kind", [PrefixClient, AsyncPrefixClient])
@pytest.mark.parametrize("verify_digest", [False, True])
def test_a_fork_while_a_thread_fetches(kind: type[Any], verify_digest: bool, numbered: Server) -> None:
    """A child that is forked in the middle of an answer works, and the parent receives the rest."""
    goes_on = threading.Event()

    def half(connection: Any) -> None:
        read_request(connection)
        connection.sendall(answer()[:500])
        goes_on.wait(60)
        connection.sendall(answer()[500:])

    with hostile_server(half, says(answer())) as server, closing(kind(server.url, cache_bytes=0)) as client:
        found: list[bool] = []
        reading = threading.Thread(target=lambda: found.append(is_right(called(client, "a/b@1"))))
        reading.start()
        while not server.requests:
            time.sleep(0.01)
        time.sleep(0.1)
        assert in_child(lambda: is_right(called(client, "a/b")))
        goes_on.set()
        reading.join()
        assert found == [True]
    options = {"cache_bytes": 0, "verify_digest": verify_digest}
    with closing(kind(numbered.url, numbered.admin_key, **options)) as used:
        called(used, "forks/a1")
        assert in_child(lambda: numbers_in(called(used, "forks/a2"))) == [2]


@contextmanager
def closing(client: Any) -> Iterator[Any]:
    """Yields a client of either kind, and closes it."""
    yield client
    closed = client.close()
    if isinstance(client, AsyncPrefixClient):
        asyncio.run(closed)


def called(client: Any, reference: str) -> Any:
    """Returns a prefix from a client of either kind."""
    found = client.get(reference)
    return asyncio.run(found) if isinstance(client, AsyncPrefixClient) else found


@pytest.mark.parametrize("kind", [PrefixClient, AsyncPrefixClient])
def test_locks_that_are_held_at_the_fork_hold_nobody_up_in_the_child(
    kind: type[Any], numbered: Server, tmp_path: Path
) -> None:
    """A child works whichever of a client's locks a thread of the parent held at the fork."""
    made = kind(numbered.url, numbered.admin_key, cache_dir=tmp_path / "c", verify_digest=True)
    with closing(made) as client, ExitStack() as stack:
        called(client, "forks/a1")
        held = locks_of(client)
        assert held
        for lock in held:
            stack.enter_context(lock)
        assert in_child(lambda: [numbers_in(called(client, f"forks/a{n}")) for n in (1, 2)]) == [[1], [2]]


def locks_of(client: Any) -> list[Any]:
    """Returns every lock that a client's own objects hold."""
    found, seen, waiting = [], set[int](), [client]
    while waiting:
        each = waiting.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, type(threading.Lock())):
            found.append(each)
        elif isinstance(each, dict | list | tuple) or type(each).__module__.startswith("prefix_service.client"):
            waiting += gc.get_referents(each)
    return found


def test_what_the_parent_cached_is_there_in_the_child() -> None:
    """A version that the parent fetched costs the child no request."""
    with hostile_server(says(answer(), answer())) as server, PrefixClient(server.url) as client:
        client.get("a/b@1")
        assert in_child(lambda: is_right(client.get("a/b@1")))
    assert [len(each) for each in server.requests] == [1]


def test_a_transport_of_the_callers_own_stays_in_its_process(numbered: Server) -> None:
    """A child refuses a transport that was used before the fork, and can use one that was not."""
    with httpx.HTTPTransport() as http, PrefixClient(numbered.url, numbered.admin_key, http=http) as client:
        assert in_child(lambda: numbers_in(client.get("forks/a3"))) == [3]
        client.get("forks/a1@1")
        assert in_child(lambda: numbers_in(client.get("forks/a1@1"))) == [1]  # cached
        with pytest.raises(InvalidRequest, match="fork"):
            in_child(lambda: numbers_in(client.get("forks/a2")))
        assert numbers_in(client.get("forks/a2")) == [2]


@pytest.mark.parametrize("kind", [PrefixClient, AsyncPrefixClient])
def test_a_client_travels_as_its_arguments(kind: type[Any], numbered: Server, tmp_path: Path) -> None:
    """A pickled client is made again of the same arguments, and its text has neither key nor password."""
    url = numbered.url.replace("http://", "http://user:password@")
    with closing(kind(url, numbered.admin_key, cache_dir=tmp_path / "c", timeout=60)) as client:
        called(client, "forks/a1")
        travelled = pickle.dumps(client)
    with closing(pickle.loads(travelled)) as again:  # noqa: S301 - of this test
        assert numbers_in(called(again, "forks/a2")) == [2]
        assert repr(again) == repr(client) == f"{kind.__name__}('{numbered.url}')"


def test_one_client_on_two_event_loops(numbered: Server) -> None:
    """One loop after another can use a client; a transport of the caller's own belongs to the first."""
    with closing(AsyncPrefixClient(numbered.url, numbered.admin_key, cache_bytes=0)) as client:
        for number in (1, 2, 3):
            assert numbers_in(asyncio.run(client.get(f"forks/a{number}"))) == [number]
            assert asyncio.run(client.inspect(f"forks/a{number}"))["adapter"] == f"a{number}"
    bound = AsyncPrefixClient(numbered.url, numbered.admin_key, http=httpx.AsyncHTTPTransport())
    with asyncio.Runner() as first:
        first.run(bound.get("forks/a1"))
        with pytest.raises(InvalidRequest, match="event loop"):
            asyncio.run(bound.get("forks/a2"))
        first.run(bound.close())
