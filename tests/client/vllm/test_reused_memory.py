"""A worker receives prefixes into memory that an earlier one has left, and never into memory that is still in use."""

import asyncio
import contextlib
import gc
import mmap
import random
import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from torch import Tensor

from prefix_service.client import PrefixClient
from prefix_service.client.cache import memory as cache_memory
from prefix_service.client.vllm import reused_memory as module
from prefix_service.client.vllm.config import ConnectorConfig
from prefix_service.client.vllm.model import Model
from prefix_service.client.vllm.reused_memory import ReusedMemory
from prefix_service.client.vllm.shelf import Orders
from prefix_service.client.vllm.source import Source
from prefix_service.client.vllm.worker import Layer, WorkerHalf
from prefix_service.errors import ConnectionFailed, InvalidResponse, TooLarge
from prefix_service.system import host_memory
from tests.client.hostile import BODY, answer, hostile_server, says
from tests.conftest import Server
from tests.processes import eventually

_MIB = 1 << 20
_SHAPE = {"peft_type": "PREFIX_TUNING", "task_type": "CAUSAL_LM", "num_layers": 8, "num_attention_heads": 8}


def _tensor(memory: ReusedMemory, nbytes: int, value: int = 0) -> Tensor:
    tensor = torch.frombuffer(memory.allocate(nbytes), dtype=torch.uint8)
    assert len(tensor) == nbytes
    return tensor.fill_(value) if value else tensor


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


@pytest.fixture
def _all_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    for one in (host_memory, cache_memory, module):
        monkeypatch.setattr(one, "LARGE", 1)


def test_memory_is_used_again_when_its_last_view_is_gone() -> None:
    """A tensor over a part of it, and a view alone, keep it from the next caller."""
    memory = ReusedMemory(500 * _MIB)
    first = _tensor(memory, 40 * _MIB, value=7)
    place, part = first.data_ptr(), first.view(40, -1)[3]
    del first
    second = _tensor(memory, 40 * _MIB)
    assert second.data_ptr() != place
    assert int(part.min()) == int(part.max()) == 7
    del part
    view = memory.allocate(40 * _MIB)[:5]
    assert torch.frombuffer(view, dtype=torch.uint8).data_ptr() == place
    assert _tensor(memory, 40 * _MIB).data_ptr() not in (place, second.data_ptr())
    assert bytes(view) == bytes([7] * 5)


@pytest.mark.parametrize("nbytes", [33 * _MIB + 5, 70 * _MIB + 1])
def test_memory_of_another_size_is_made_to_fit(nbytes: int) -> None:
    """Its rest goes back to the system, or as much as is missing is added; the next caller may fill all of it."""
    memory = ReusedMemory(500 * _MIB)
    _tensor(memory, 40 * _MIB, value=7)
    before = _resident()
    again = _tensor(memory, nbytes)
    assert bool((again[: 33 * _MIB] == 7).all())
    again.fill_(1)
    assert abs(_resident() - before - (nbytes - 40 * _MIB)) < 8 * _MIB


def test_spare_memory_counts_against_the_budget() -> None:
    """What is in use and what is kept have at most the budget together; what is in use alone may exceed it."""
    memory = ReusedMemory(100 * _MIB)
    before = _resident()
    many = [_tensor(memory, 40 * _MIB, value=1) for _ in range(5)]
    assert _resident() - before > 190 * _MIB
    del many[:3]
    many.append(_tensor(memory, 40 * _MIB, value=1))  # of three that are spare, none may stay beside three in use
    assert 110 * _MIB < _resident() - before < 130 * _MIB
    many.clear()
    assert 70 * _MIB < _resident() - before < 100 * _MIB
    one = _tensor(memory, 40 * _MIB, value=1)
    assert 70 * _MIB < _resident() - before < 100 * _MIB
    other = _tensor(memory, 90 * _MIB, value=1)
    assert 120 * _MIB < _resident() - before < 140 * _MIB
    del one, other
    two = [_tensor(memory, 40 * _MIB, value=1) for _ in range(2)]
    two.clear()
    assert 70 * _MIB < _resident() - before < 100 * _MIB
    whole = _tensor(memory, 100 * _MIB, value=1)
    assert 90 * _MIB < _resident() - before < 110 * _MIB
    del whole


@pytest.mark.parametrize("fails", [False, True])
def test_memory_that_is_returned_while_another_is_allocated_counts_at_once(
    monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """Beyond the budget it leaves, without a later call; also if the allocation fails."""
    memory, real = ReusedMemory(100 * _MIB), cache_memory.allocate
    held = [memory.allocate(90 * _MIB) for _ in range(2)]

    def meanwhile(nbytes: int, *, pinned: bool) -> memoryview:
        held.clear()  # as in another thread, or by garbage collection in this one
        if fails:
            raise InvalidResponse("no memory")
        return real(nbytes, pinned=pinned)

    monkeypatch.setattr(module, "allocate", meanwhile)
    with contextlib.suppress(InvalidResponse):
        held.append(memory.allocate(40 * _MIB))
    assert memory._returned.empty()
    assert memory._in_use == (0 if fails else 40 * _MIB)
    assert memory._in_use + sum(map(len, memory._spare)) <= 100 * _MIB


def test_memory_beyond_the_budget_takes_no_spare_memory() -> None:
    """A body that claims more than all prefixes may have does not take from those that come after it."""
    memory = ReusedMemory(100 * _MIB)
    _tensor(memory, 40 * _MIB, value=1)
    large = _tensor(memory, 100 * _MIB + 1)
    del large
    is_kept = bool((_tensor(memory, 40 * _MIB) == 1).all())
    assert is_kept


def test_small_memory_is_the_allocators() -> None:
    """malloc uses small memory again by itself."""
    memory = ReusedMemory(100 * _MIB)
    small = memory.allocate(host_memory.LARGE - 1)
    assert memory._in_use == 0
    large = memory.allocate(host_memory.LARGE)
    assert memory._in_use == len(large) == len(small) + 1


def test_no_memory_left() -> None:
    """A size that the system refuses is an answer that claims it, with spare memory and without."""
    memory = ReusedMemory(1 << 62)
    with pytest.raises(InvalidResponse, match="for which there is no memory"):
        memory.allocate(1 << 61)
    _tensor(memory, 40 * _MIB, value=1)
    with pytest.raises(InvalidResponse, match="for which there is no memory"):
        memory.allocate(1 << 61)
    assert len(memory.allocate(40 * _MIB)) == 40 * _MIB
    assert memory._in_use <= 40 * _MIB


@pytest.mark.usefixtures("_all_is_large")
def test_threads_never_share_memory() -> None:
    """Memory that one thread fills keeps its content while others come and go, in all sizes."""
    memory, torn, failed = ReusedMemory(20 * _MIB), list[int](), list[BaseException]()

    def work(number: int) -> None:
        draw = random.Random(number)  # noqa: S311
        held: list[tuple[int, Tensor]] = []
        try:
            for turn in range(300):
                value = (number * 61 + turn) % 255 + 1
                held.append((value, _tensor(memory, draw.randrange(1, 3 * _MIB), value)))
                if len(held) > 3:
                    value, tensor = held.pop(draw.randrange(3))
                    if bool((tensor != value).any()):
                        torn.append(value)
        except BaseException as error:  # noqa: BLE001 - shown below
            failed.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert not torn
    assert memory._in_use == 0  # also what a thread returned while another held the lock
    assert sum(map(len, memory._spare)) <= 20 * _MIB


@pytest.mark.parametrize("connections", [1, 3])
async def test_a_worker_gets_exact_prefixes_in_memory_that_others_left(server: Server, connections: int) -> None:
    """Of versions of different sizes, in turns, while some of them are held."""
    sizes = {"small": 1100, "middle": 1200, "large": 1500}  # tokens of 32 KiB
    for seed, (name, tokens) in enumerate(sizes.items()):
        config = {**_SHAPE, "token_dim": 512, "num_virtual_tokens": tokens}
        path = f"/v1/tenants/reused/adapters/{name}{connections}/versions"
        made = server.client().post(path, json={"config": config, "seed": seed})
        assert made.status_code == 201, made.text
    with PrefixClient(server.url, server.admin_key) as client:
        whole = {name: client.get(f"reused/{name}{connections}", dtype="float32").kv.tensor for name in sizes}
    options = {"url": server.url, "api_key_env": "REUSED_KEY", "connections": connections}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REUSED_KEY", server.admin_key)
        memory = ReusedMemory(200 * _MIB)
        source = Source(ConnectorConfig.of(options), memory)
    places, held = set[int](), dict[str, Tensor]()
    for name in ("small", "large", "middle", "middle", "small", "large", "small", "small", "middle", "large") * 2:
        held.pop(name, None)  # its memory is spare now
        held[name] = (await source.get(f"reused/{name}{connections}", dtype="float32")).kv.tensor
        places.add(held[name].untyped_storage().data_ptr())
        assert all(torch.equal(tensor, whole[one]) for one, tensor in held.items())
    assert len(places) < 12  # of 20 prefixes
    in_use = memory._in_use
    gc.disable()  # an early fetch that fails leaves its memory to the next one, not to the garbage collector
    try:
        await _fetch_early_without_room(source, f"reused/large{connections}")
        await asyncio.to_thread(eventually, lambda: memory._in_use == in_use, 5)
    finally:
        gc.enable()
    await source.close()


async def _fetch_early_without_room(source: Source, reference: str) -> None:
    """Has a worker begin an early fetch, which fails at its first bytes, fetch the same in its place, and drop that."""
    model = SimpleNamespace(dtype="float32", check=lambda _metadata: None)
    half = WorkerHalf(source, cast("Model", model), (0, 8), early_bytes=0)
    half._layers = dict.fromkeys(range(8), cast("Layer", None))
    half.start(Orders(early=[(1, (reference,))]))
    assert isinstance(await asyncio.to_thread(half._early[1].exception), TooLarge)
    half.start(Orders(fetches=[(2, (reference,), 1)]))
    assert len(await asyncio.to_thread(half._parcels[2].result)) == 1
    half.start(Orders(drops=[2]))
    half._background.close(partial(asyncio.sleep, 0))


@pytest.mark.usefixtures("_all_is_large")
@pytest.mark.parametrize("missing", [1, 1000, len(BODY)])
async def test_an_answer_that_breaks_off_shows_nothing_of_an_earlier_one(
    missing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its memory holds an earlier prefix where bytes are missing: it is an error."""
    monkeypatch.setenv("PREFIX_API_KEY", "key")
    torn = answer()[:-missing]
    with hostile_server(says(answer(), torn), says(torn)) as server:
        source = Source(ConnectorConfig.of({"url": server.url, "timeout": 1}), ReusedMemory(_MIB))
        assert (await source.get("a/b")).kv.tensor.numel()
        with pytest.raises(ConnectionFailed):
            await source.get("a/b")
        await source.close()
