"""Makes clients of the real server, and puts things between them and it."""

import asyncio
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest
from torch import Tensor

from prefix_service.checkpoints.sources import prepare_upload
from prefix_service.client import AsyncPrefixClient, Prefix, PrefixClient
from prefix_service.client.transport import retries
from prefix_service.errors import PrefixServiceError
from tests.architectures import NAMED
from tests.conftest import CORPUS, NO_TLS, Server
from tests.vision import VISION

ARCHITECTURES = NAMED | VISION
LLAMA = CORPUS / "cases" / "llama-n20-emb" / "adapter"
GPT2 = CORPUS / "cases" / "gpt2-n20-emb" / "adapter"


class Counting(httpx.HTTPTransport):
    """httpx's own transport, which remembers statuses, and can damage bodies."""

    def __init__(self, damage: Callable[[bytes], bytes] | None = None) -> None:
        super().__init__(verify=NO_TLS)
        self.statuses: list[int] = []
        self._damage = damage

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Passes a request on."""
        response = super().handle_request(request)
        self.statuses.append(response.status_code)
        if self._damage is None:
            return response
        body = self._damage(response.read())
        return httpx.Response(response.status_code, headers=response.headers, stream=httpx.ByteStream(body))


class Awaited:
    """An `AsyncPrefixClient`, called as the blocking one is."""

    def __init__(self, client: AsyncPrefixClient, loop: asyncio.AbstractEventLoop) -> None:
        self._client, self._loop = client, loop

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)
        if not asyncio.iscoroutinefunction(method):
            return method
        return lambda *args, **options: self._loop.run_until_complete(method(*args, **options))


@pytest.fixture(params=["blocking", "async"])
def connect(request: pytest.FixtureRequest, server: Server) -> Iterator[Callable[..., Any]]:
    """Yields a function that makes clients of either kind, of the service or of what stands before it."""
    loop = asyncio.new_event_loop()
    opened: list[Any] = []

    def connected(url: str, **options: Any) -> Any:
        if request.param == "blocking":
            opened.append(PrefixClient(url, server.admin_key, **options))
        else:
            opened.append(Awaited(AsyncPrefixClient(url, server.admin_key, **options), loop))
        return opened[-1]

    yield connected
    for each in opened:
        each.close()
    loop.close()


@pytest.fixture
def client(connect: Callable[..., Any], server: Server) -> Any:
    """Returns a client of either kind."""
    return connect(server.url)


@pytest.fixture
def two_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives each request of a client two attempts, however much of its deadline a slow machine takes for them."""
    decide = retries.Attempts.pause_after

    def pause_after(attempts: retries.Attempts, error: PrefixServiceError) -> float | None:
        pause = decide(attempts, error)
        return None if pause is None or pause > retries._FIRST_PAUSE else pause

    monkeypatch.setattr(retries.Attempts, "pause_after", pause_after)


PublishAndGet = Callable[..., Prefix]
Pairs = Callable[..., list[tuple[Tensor, Tensor]]]
Peft = Callable[[str], Any]


@pytest.fixture(scope="session")
def adapter_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Returns the folder in which PEFT saved an adapter for an architecture."""
    return cache(lambda name: ARCHITECTURES[name].save_adapter(tmp_path_factory.mktemp(name)))


@pytest.fixture(scope="session")
def peft_model(adapter_dir: Callable[[str], Path]) -> Peft:
    """Returns PEFT's own model of an architecture, with that adapter."""
    return cache(lambda name: ARCHITECTURES[name].peft(adapter_dir(name)))


@pytest.fixture(scope="session")
def prefix_of(adapter_dir: Callable[[str], Path], server: Server) -> Callable[[str], Prefix]:
    """Returns PEFT's adapter, published to the real server and fetched from it."""

    def publish_and_get(name: str) -> Prefix:
        upload = prepare_upload(adapter_dir(name))
        with PrefixClient(server.url, server.admin_key) as client, upload.weights as weights:
            client.publish_files(f"architectures/{name}", upload.config, weights)
            return client.get(f"architectures/{name}")

    return cache(publish_and_get)


@pytest.fixture
def pairs(prefix_of: Callable[[str], Prefix]) -> Pairs:
    """Returns that adapter's keys and values, from the service."""
    return lambda name, batch_size=1: prefix_of(name).for_batch(batch_size).past_key_values
