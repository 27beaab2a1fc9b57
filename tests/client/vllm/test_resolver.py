"""The resolver asks a real service which version a reference means, and lets no request wait for another tenant's."""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import CancelledError
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from prefix_service.client import AsyncPrefixClient, Fingerprint, PrefixClient
from prefix_service.client.base_model_check import BaseModelCheck
from prefix_service.client.vllm import resolver as module
from prefix_service.client.vllm.background import Background
from prefix_service.client.vllm.base_model import BaseModel
from prefix_service.client.vllm.composition import Composition
from prefix_service.client.vllm.config import ConnectorConfig
from prefix_service.client.vllm.model import Model
from prefix_service.client.vllm.resolver import _QUESTIONS, Resolver
from prefix_service.client.vllm.source import Source
from prefix_service.errors import (
    BaseModelMismatch,
    ConnectionFailed,
    DimensionMismatch,
    NotFound,
    Unauthenticated,
    Unavailable,
)
from tests.client.conftest import GPT2
from tests.client.holding_proxy import Holder, holding_proxy
from tests.conftest import Publish, Server

_CONFIG = SimpleNamespace(to_dict=lambda: {"model_type": "llama", "rms_norm_eps": 1e-6})
OTHER_MODEL = SimpleNamespace(
    model_config=SimpleNamespace(
        hf_config=_CONFIG, model="no/such-model", revision=None, tokenizer="", tokenizer_revision=None
    )
)
"""vLLM's configuration of a model whose files are elsewhere."""


@pytest.fixture
def held(server: Server, publish: Publish, monkeypatch: pytest.MonkeyPatch) -> Iterator[Holder]:
    """Yields a proxy to a service with adapters of two tenants."""
    monkeypatch.setenv("PREFIX_API_KEY", server.admin_key)
    for tenant in ("quick", "slow"):
        publish(tenant, "a", GPT2)
    with holding_proxy(server.url) as holder:
        yield holder


@asynccontextmanager
async def resolving(url: str, check: BaseModelCheck = "warn", **more: Any) -> AsyncIterator[Resolver]:
    """Yields a resolver, which is closed at the end."""
    with PrefixClient(url, os.environ["PREFIX_API_KEY"]) as client:
        told = client.get("quick/a").metadata
    model = Model(told["num_layers"], told["num_kv_heads"], told["head_dim"], "float32", 128)
    source = Source(ConnectorConfig.of({"url": url, "timeout": 20, **more}))
    resolver = Resolver(source, model, BaseModel(OTHER_MODEL, check))
    try:
        yield resolver
    finally:
        await resolver.close()


async def test_what_was_resolved_is_recalled_for_ever_or_for_a_second(
    held: Holder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers and digests always mean one version; an alias may move, so it is asked for again."""
    now = 1000.0
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now))
    async with resolving(held.url) as resolver:
        assert resolver.recall(("quick/a@1",)) is None
        version = await resolver.resolve(("quick/a@1",))
        latest = await resolver.resolve(("quick/a",))
        now += 0.9
        assert version == latest == resolver.recall(("quick/a",)) == resolver.recall(version.references)
        now += 0.2
        assert resolver.recall(("quick/a",)) is None
        assert resolver.recall(("quick/a@1",)) == version
        held.hold(b"/tenants/quick/")
        again = asyncio.create_task(resolver.resolve(("quick/a",)))
        await asyncio.to_thread(held.wait_for, 1)
        held.hold()
        assert await again == version
        resolver.forget()
        assert resolver.recall(("quick/a@1",)) is None


@pytest.mark.parametrize("other", [b"/prefix", b"/base-model"])
async def test_a_question_is_one_request_without_tensors(held: Holder, other: bytes) -> None:
    """A question is answered while every fetch of a prefix, or of a base model's fingerprint, is held up."""
    async with resolving(held.url) as resolver:
        held.hold(other)
        assert (await resolver.resolve(("quick/a",))).versions[0].number == 1
        held.hold()


async def test_one_question_for_all_who_wait_and_none_when_nobody_does(held: Holder) -> None:
    """When the last request leaves, the question is cancelled, and the service sees its connection end."""
    async with resolving(held.url) as resolver:
        held.hold(b"/tenants/slow/")
        asking = [asyncio.create_task(resolver.resolve(("slow/a",))) for _ in range(5)]
        await asyncio.to_thread(held.wait_for, 1)
        for task in asking[:4]:
            task.cancel()
        held.hold()
        assert isinstance(await asking[4], Composition)
        held.hold(b"/tenants/slow/")
        asking = [asyncio.create_task(resolver.resolve(("slow/a@1",))) for _ in range(5)]
        await asyncio.to_thread(held.wait_for, 1)
        for task in asking:
            task.cancel()
        await asyncio.to_thread(held.wait_for, 0)


async def test_a_tenant_that_is_slow_holds_up_nobody_else(held: Holder) -> None:
    """A tenant's many questions delay no other tenant's; each is answered, or fails at the deadline with the reason."""
    async with resolving(held.url, timeout=120) as resolver:
        held.hold(b"/tenants/slow/")
        asking = [asyncio.create_task(resolver.resolve((f"slow/none-{number}",))) for number in range(40)]
        await asyncio.to_thread(held.wait_for, _QUESTIONS // 2)
        assert (await resolver.resolve(("quick/a",))).num_virtual_tokens > 0
        with pytest.raises(NotFound):
            await resolver.resolve(("quick/none",))
        assert held.waiting == _QUESTIONS // 2
        for task in asking:
            task.cancel()
        held.hold()
    async with resolving(held.url, timeout=1) as resolver:
        held.hold(b"/tenants/slow/")
        asking = [asyncio.create_task(resolver.resolve((f"slow/none-{number}",))) for number in range(40)]
        results = await asyncio.gather(*asking, return_exceptions=True)
        assert {type(result) for result in results} <= {ConnectionFailed, Unavailable}
        assert "did not say within 1.0 s what slow/none-39 means" in str(results[39])


async def test_requests_that_leave_make_room_for_the_others_of_their_tenant(held: Holder) -> None:
    """Requests that leave free their place, whether they were asked already or waited."""
    async with resolving(held.url) as resolver:
        held.hold(b"/none-")
        asking = [asyncio.create_task(resolver.resolve((f"slow/none-{number}",))) for number in range(40)]
        await asyncio.to_thread(held.wait_for, _QUESTIONS // 2)
        served = asyncio.create_task(resolver.resolve(("slow/a",)))
        for task in asking:
            task.cancel()
        assert isinstance(await served, Composition)
        await asyncio.to_thread(held.wait_for, 0)


async def test_a_tenant_above_its_rate_delays_its_own_new_adapters_alone(server: Server, held: Holder) -> None:
    """One tenant asks forty questions at one a second; another tenant's question is not delayed."""
    with PrefixClient(server.url, server.admin_key) as client:
        client.put_tenant("slow", {"requests_per_second": 1})
    async with resolving(held.url, timeout=30) as resolver:
        asking = [asyncio.create_task(resolver.resolve((f"slow/none-{number}",))) for number in range(40)]
        await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED)
        began = time.monotonic()
        await resolver.resolve(("quick/a",))
        took = time.monotonic() - began
        assert sum(task.done() for task in asking) < 20
        for task in asking:
            task.cancel()
    with PrefixClient(server.url, server.admin_key) as client:
        client.put_tenant("slow", {"requests_per_second": None})
    assert took < 20  # twenty of the other tenant's would have taken as long


async def test_while_the_service_does_not_answer_an_alias_means_what_it_meant(held: Holder) -> None:
    """The first request waits a second, later ones not at all; once it answers, the alias is followed again."""
    async with resolving(held.url) as resolver:
        version, other = await resolver.resolve(("slow/a",)), await resolver.resolve(("quick/a",))
        await asyncio.sleep(1.1)
        held.hold(b"/tenants/slow/")
        assert await resolver.resolve(("slow/a",)) == version
        assert resolver.recall(("slow/a",)) == version
        assert resolver.recall(("quick/a",)) is None  # another tenant is asked for
        assert await resolver.resolve(("quick/a",)) == other
        unknown = asyncio.create_task(resolver.resolve(("slow/unknown",)))
        await asyncio.to_thread(held.wait_for, 2)  # it, and the one that waits for news
        held.hold()
        with pytest.raises(NotFound):
            await unknown
        await _until(lambda: resolver.recall(("slow/a",)) is None)


async def _until(condition: Any) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - there is no event for the passing of time
            await asyncio.sleep(0.05)


async def test_a_version_of_another_model_is_not_remembered(held: Holder) -> None:
    """A version that does not fit is asked for, and refused, each time."""
    source = Source(ConnectorConfig.of({"url": held.url}))
    resolver = Resolver(source, Model(9, 2, 8, "float32", 128), BaseModel(OTHER_MODEL, "off"))
    for _ in range(2):
        with pytest.raises(DimensionMismatch):
            await resolver.resolve(("quick/a@1",))
        assert resolver.recall(("quick/a@1",)) is None
    await resolver.close()


async def test_a_rotated_key_is_read_again_from_its_file(server: Server, publish: Publish, tmp_path: Path) -> None:
    """The file is read after a 401; if it still has the refused key, the caller gets the 401, which says whose key was
    refused. A new key's tenant is asked for in advance if the old key's was: the service may be away later."""
    publish("quick", "a", GPT2)
    file = tmp_path / "key"
    file.write_text("prefix_" + "0" * 16)
    source = Source(ConnectorConfig.of({"url": server.url, "api_key_file": file}))
    for asked in (source.tenant(), source.resolve("quick/a")):
        with pytest.raises(Unauthenticated, match="refuses the key that vLLM has from api_key_file: "):
            await asked
    file.rename(tmp_path / "away")
    with pytest.raises(Unauthenticated):
        await source.get("quick/a")
    file.write_text(server.admin_key + "\n")
    found = await asyncio.gather(*(source.get("quick/a") for _ in range(3)))
    assert {prefix.version for prefix in found} == {1}
    assert source._tenant is not None
    assert source._tenant[0] is source._client
    assert await source.tenant() is None
    await source.close()


async def test_the_client_of_a_replaced_key_is_closed_when_its_last_call_ends(
    server: Server, publish: Publish, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine whose key rotates every hour keeps one client open; calls that wait for the old one get answers."""
    publish("quick", "a", GPT2)
    closed: list[AsyncPrefixClient] = []
    close = AsyncPrefixClient.close

    async def noted(client: AsyncPrefixClient) -> None:
        closed.append(client)
        await close(client)

    monkeypatch.setattr(AsyncPrefixClient, "close", noted)
    file = tmp_path / "key"
    file.write_text("prefix_" + "0" * 16)
    source = Source(ConnectorConfig.of({"url": server.url, "api_key_file": file}))
    first, answer = source._client, asyncio.Event()
    waiting = asyncio.create_task(source._call(lambda _: answer.wait()))
    await asyncio.sleep(0)
    file.write_text(server.admin_key)
    await asyncio.gather(*(source.get("quick/a") for _ in range(3)))
    assert (source._client is first, closed) == (False, [])
    answer.set()
    assert await waiting
    assert closed == [first]
    assert not source._calls
    await source.close()
    assert closed == [first, source._client]


def test_work_in_the_background_can_be_cancelled_and_ends_with_its_loop() -> None:
    """The caller's thread never waits; closing before the first coroutine does nothing."""
    background, closed = Background("test"), []

    async def last() -> None:
        closed.append(True)

    background.close(last)
    waiting = background.submit(asyncio.sleep(60))
    cancelled = background.submit(asyncio.sleep(60))
    cancelled.cancel()
    assert background.submit(asyncio.sleep(0, "done")).result(60) == "done"
    background.close(last)
    with pytest.raises(CancelledError):
        waiting.result(60)


@pytest.mark.parametrize("check", ["off", "warn", "refuse"])
async def test_the_base_model_of_a_version_is_compared(
    server: Server, held: Holder, publish: Publish, check: BaseModelCheck, caplog: pytest.LogCaptureFixture
) -> None:
    """A version of another base model is refused, or warned of once, or served; the message has both values."""
    publish("vllm-bases", check, GPT2)
    with PrefixClient(server.url, server.admin_key) as client:
        client.put_base_model(f"vllm-bases/{check}", Fingerprint("llama", norms={"rms_norm_eps": 1e-5}))
    words = f"vllm-bases/{check}@1 was made for another base model: norms.rms_norm_eps is 1e-06 here, and was 1e-05. "
    async with resolving(held.url, check) as resolver:
        await resolver.resolve(("quick/a",))
        if check == "refuse":
            with pytest.raises(BaseModelMismatch, match=words):
                await resolver.resolve((f"vllm-bases/{check}",))
        else:
            for reference in (f"vllm-bases/{check}", f"vllm-bases/{check}@1"):
                assert (await resolver.resolve((reference,))).versions[0].number == 1
    assert [record.message.startswith(words) for record in caplog.records] == [True] * (check == "warn")
