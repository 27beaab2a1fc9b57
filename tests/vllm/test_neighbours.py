"""vLLM's server meets a service that is slow, throttled, stopped or refuses, and disturbs no other requests.

The KV cache is small: 47 blocks of 32 tokens.
"""

import asyncio
import json
import re
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx
import pytest

from prefix_service.client import PrefixClient
from tests.client.holding_proxy import Holder, holding_proxy
from tests.conftest import Server
from tests.processes import eventually
from tests.vllm.conftest import serving_adapters
from tests.vllm.driver import openai_server, transfer_config
from tests.vllm.publishing import publish
from tests.vllm.reference import Reference
from tests.vllm.tokenizer import save_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers' own

_COUNT: Final = 8  # tokens of an answer
_PATH: Final = "/v1/completions"
_MANY: Final = httpx.Limits(max_connections=None)
_BYTES: Final = b"layers=0%3A4"  # in the requests of workers alone


@dataclass
class Serving:
    """vLLM's server, the service that it uses, the proxy between them, and the file of vLLM's key."""

    vllm: httpx.Client
    service: Server
    held: Holder
    key_file: Path
    reference: Reference

    def body(self, adapter: str | None, prompt: str | list[int] = "short", **more: Any) -> dict[str, Any]:
        """Returns a completion's request."""
        named = {} if adapter is None else {"kv_transfer_params": {"prefix_adapter": adapter}}
        ids = self.reference.prompts[prompt] if isinstance(prompt, str) else prompt
        fixed = {"model": "model", "max_tokens": _COUNT, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
        return {**fixed, "prompt": ids, **named, **more}

    def ask(self, adapter: str | None, prompt: str | list[int] = "short", **more: Any) -> httpx.Response:
        """Returns the answer of a completion."""
        return self.vllm.post(_PATH, json=self.body(adapter, prompt, **more))

    @asynccontextmanager
    async def asking(self, *adapters: str) -> AsyncIterator[list["asyncio.Task[httpx.Response]"]]:
        """Yields clients that ask for an adapter each, and that leave at the end of the block."""
        async with httpx.AsyncClient(base_url=self.vllm.base_url, timeout=120, limits=_MANY) as client:
            tasks = [asyncio.create_task(client.post(_PATH, json=self.body(adapter))) for adapter in adapters]
            try:
                yield tasks
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    def check(self, answer: httpx.Response, adapter: str | None, prompt: str = "short") -> None:
        """Compares the tokens with those of PEFT's `generate`."""
        assert answer.status_code == 200, answer.text
        said = self.reference.says(adapter, prompt, _COUNT)
        assert answer.json()["choices"][0]["token_ids"] == said.tokens, (adapter, answer.text)

    def seconds(self, adapter: str) -> float:
        """Returns the shortest time of seven right answers: the longer ones may be the machine's."""
        times = []
        for _ in range(7):
            began = time.monotonic()
            self.check(self.ask(adapter), "a")
            times.append(time.monotonic() - began)
        return min(times)

    def change(self, call: Callable[[PrefixClient], object]) -> None:
        """Changes something in the service."""
        with PrefixClient(self.service.url, self.service.admin_key) as client:
            call(client)


@pytest.fixture(scope="module")
def serving(reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """Yields a server whose requests to the service pass through a proxy."""
    folder = tmp_path_factory.mktemp("neighbours")
    save_tokenizer(reference.model)
    with serving_adapters(reference, folder) as service, holding_proxy(service.url) as held:
        key_file = folder / "key"
        key_file.write_text(service.key("read"))
        transfer = transfer_config(held.url, timeout=60, api_key_file=str(key_file))
        options = ["--middleware", "prefix_service.client.vllm.PrefixMiddleware", "--max-model-len", "1024"]
        options += ["--block-size", "32", "--num-gpu-blocks-override", "48"]
        with openai_server(folder, reference.model, transfer, "", *options) as vllm:
            yield Serving(vllm, service, held, key_file, reference)


def test_a_key_of_the_platform_without_patterns_names_no_model(serving: Serving) -> None:
    """Without patterns no adapter is in the list or a `model`, but `prefix_adapter` can name one."""
    assert [card["id"] for card in serving.vllm.get("/v1/models").json()["data"]] == ["model"]
    assert serving.vllm.post(_PATH, json={**serving.body(None), "model": "acme/a"}).status_code == 404
    serving.check(serving.ask("acme/a"), "a")


def test_metrics_show_what_a_request_under_way_has(serving: Serving) -> None:
    """An adapter is in the cache while a request is answered, and in host memory afterwards too."""
    with ThreadPoolExecutor(1) as threads:
        answers: list[Future[httpx.Response]] = []

        def is_seen() -> bool:
            if not answers or answers[-1].done():  # a request may be answered while nobody looks: then another one
                answers.append(threads.submit(serving.ask, "acme/a", max_tokens=400))
            return _levels(serving) == {"cpu", "gpu"} and not answers[-1].done()

        eventually(is_seen)
        assert {answer.result().status_code for answer in answers} == {200}
    eventually(lambda: _levels(serving) == {"cpu"})


def _levels(serving: Serving) -> set[str]:
    series = r'vllm:prefix_adapter_loaded\{adapter_name="acme/a",engine="0",level="(.*)",model_name="model"\} 1.0'
    return set(re.findall(series, serving.vllm.get("/metrics").text))


def test_loads_that_are_slow_hold_no_blocks(serving: Serving) -> None:
    """A plain request is answered while six slow loads, too many for the blocks, wait for their first bytes."""
    names = [f"large-{number}" for number in range(6)]
    for name in names:
        publish(serving.service, f"acme/{name}", serving.reference.adapter("large"))
    serving.held.hold(_BYTES)
    with ThreadPoolExecutor(len(names)) as threads:
        answers = [threads.submit(serving.ask, f"acme/{name}") for name in names]
        try:
            serving.held.wait_for(len(names))
            serving.check(serving.ask(None, "long"), None, "long")
            assert not any(answer.done() for answer in answers)
        finally:
            serving.held.hold()
        for answer in answers:
            serving.check(answer.result(), "large")


@pytest.mark.parametrize(
    ("pattern", "names", "held"), [(b"/none-", [f"none-{n}" for n in range(8)], 8), (_BYTES, ["left"] * 8, 1)]
)
async def test_clients_that_leave_give_up_questions_and_bytes(
    serving: Serving, pattern: bytes, names: list[str], held: int
) -> None:
    """The middleware and the engine's workers close their connections to the service when clients leave."""
    if pattern == _BYTES:
        publish(serving.service, "acme/left", serving.reference.adapter("large"))
    serving.held.hold(pattern)
    try:
        async with serving.asking(*(f"acme/{name}" for name in names)):
            await asyncio.to_thread(serving.held.wait_for, held)
        await asyncio.to_thread(serving.held.wait_for, 0)
    finally:
        serving.held.hold()
    if pattern == _BYTES:
        serving.check(serving.ask("acme/left"), "large")


async def test_a_tenant_above_its_rate_delays_no_adapter_that_is_known(serving: Serving) -> None:
    """Forty waiting requests of a throttled tenant do not delay another tenant's answers."""
    serving.change(lambda client: client.put_tenant("noisy", {"requests_per_second": 1}))
    undisturbed = serving.seconds("acme/a@1")
    async with serving.asking(*(f"noisy/none-{number}" for number in range(40))) as asking:
        await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED)
        disturbed = await asyncio.to_thread(serving.seconds, "acme/a@1")
        assert not all(task.done() for task in asking)
    assert disturbed < 5 * undisturbed + 0.2


def test_what_is_known_is_served_while_the_service_is_stopped(serving: Serving) -> None:
    """A version is served as before; an alias after a second at first, then as before."""
    serving.check(serving.ask("acme/a"), "a")
    undisturbed = serving.seconds("acme/a@1")
    serving.service.process.send_signal(signal.SIGSTOP)
    try:
        assert serving.seconds("acme/a@1") < 5 * undisturbed + 0.2
        serving.check(serving.ask("acme/a"), "a")
        assert serving.seconds("acme/a") < 5 * undisturbed + 0.2
    finally:
        serving.service.process.send_signal(signal.SIGCONT)


@pytest.mark.parametrize("stream", [False, True])
def test_why_a_request_failed_reaches_its_caller(serving: Serving, stream: bool) -> None:
    """A prompt that is too long, or a version deleted while its bytes arrive, is an error in vLLM's form."""
    long = serving.ask("acme/a", prompt=[7] * 1010, stream=stream)
    told = _error(long, 400)
    assert "20 virtual tokens: with the prompt's 1010 there is no room for an answer" in told["message"]
    gone = _while_fetching(
        serving, "gone", lambda: serving.change(lambda client: client.delete("acme/gone")), stream=stream
    )
    told = _error(gone, 404, is_event=stream)
    assert "there is no acme/gone" in told["message"]


def test_a_key_that_was_rotated_is_read_again(serving: Serving) -> None:
    """With a key that was revoked meanwhile requests get 503, and answers once the file has another key."""

    def revoke() -> None:
        with serving.service.client() as client:
            key_id = serving.key_file.read_text().split("_")[1]
            assert client.delete(f"/v1/keys/{key_id}").status_code == 204

    told = _error(_while_fetching(serving, "kept", revoke, stream=True), 503, is_event=True)
    assert "key" in told["message"]
    told = _error(serving.ask("acme/unknown"), 503)
    serving.key_file.write_text(serving.service.key("read"))
    serving.check(serving.ask("acme/kept"), "large")


def _while_fetching(serving: Serving, name: str, change: Callable[[], Any], *, stream: bool) -> httpx.Response:
    """Returns the answer to a request for an adapter that `change` affects while its bytes arrive."""
    publish(serving.service, f"acme/{name}", serving.reference.adapter("large"))
    serving.held.hold(_BYTES)
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(serving.ask, f"acme/{name}", stream=stream)
        try:
            serving.held.wait_for(1)
            change()
        finally:
            serving.held.hold()
        return answer.result()


def _error(answer: httpx.Response, status: int, *, is_event: bool = False) -> Any:
    """Returns the error of an answer with this status, or of the event in one that had begun."""
    assert answer.status_code == (200 if is_event else status), answer.text
    text = answer.text
    if is_event:
        text, last = (line.removeprefix("data: ") for line in answer.text.splitlines() if line)
        assert last == "[DONE]"
    error = json.loads(text)["error"]
    assert error["code"] == status
    return error
