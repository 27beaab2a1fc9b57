"""The worker's half writes a prefix into the blocks that each group of layers keeps, and nowhere else."""

from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from prefix_service.client.vllm.model import Model
from prefix_service.client.vllm.shelf import Load, Orders, Reports
from prefix_service.client.vllm.worker import Layer, WorkerHalf
from prefix_service.errors import InvalidRequest, InvalidResponse

_BLOCKS = 12
_MODEL = Model(num_layers=2, num_kv_heads=2, head_dim=4, dtype="float32", max_length=64)


class _Backend:
    """An attention backend whose cache has a row for each slot."""

    def do_kv_cache_update(self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slots: Tensor) -> None:
        """Writes keys and values as vLLM's backends do."""
        kv_cache[0, slots], kv_cache[1, slots] = key, value


def _layer(group: int, block_size: int, *, heads: int = 2, size: int = 4, backend: Any = None) -> Layer:
    cache = torch.zeros(2, _BLOCKS * block_size, heads, size)
    module = SimpleNamespace(impl=backend or _Backend(), kv_cache=cache, num_kv_heads=heads, head_size=size)
    return Layer(module, group, block_size)


def _worker(*layers: Layer, model: Model = _MODEL) -> WorkerHalf:
    source: Any = SimpleNamespace(close=None)
    worker = WorkerHalf(source, model, (0, 2), 1 << 20)
    worker.register(dict(enumerate(layers)))
    return worker


def _written(layer: Layer) -> dict[int, float]:
    """Returns the position of the prefix in each slot that was written; a key's numbers are its position."""
    keys, values = layer.module.kv_cache
    slots = (keys != 0).any(-1).any(-1).nonzero().flatten().tolist()
    assert all(bool((keys[slot] == keys[slot, 0, 0]).all()) for slot in slots)
    assert torch.equal(values, -keys)
    return {slot: float(keys[slot, 0, 0]) for slot in slots}


def _prefix(tokens: int, heads: int = 2, size: int = 4) -> Any:
    keys = torch.arange(1.0, tokens + 1).view(1, tokens, 1).expand(heads, tokens, size)
    return SimpleNamespace(kv=SimpleNamespace(tensor=torch.stack([torch.stack([keys, -keys])] * 2)))


def test_a_layer_with_a_window_gets_whole_blocks_of_its_last_positions() -> None:
    """Blocks that a group does not keep (vLLM puts block 0 there) get nothing, the others all of their positions."""
    full, window = _layer(0, 4), _layer(1, 2)
    worker = _worker(full, window)
    worker._write(Load("r", 1, 0, 7, ([3, 5, 9], [0, 0, 4, 6, 7])), [_prefix(7)])
    assert _written(full) == {12: 1, 13: 2, 14: 3, 15: 4, 20: 5, 21: 6, 22: 7}
    assert _written(window) == {8: 5, 9: 6, 12: 7}  # positions 4 and 5 in block 4, position 6 in block 6


def test_positions_in_the_prefix_cache_are_not_written_again() -> None:
    """A load begins behind what vLLM's prefix cache has, in every group."""
    full, window = _layer(0, 4), _layer(1, 4)
    worker = _worker(full, window)
    worker._write(Load("r", 1, 4, 10, ([3, 5, 9], [0, 8, 2])), [_prefix(6), _prefix(4)])
    assert _written(full) == {20: 5, 21: 6, 22: 1, 23: 2, 36: 3, 37: 4}
    assert _written(window) == {32: 5, 33: 6, 34: 1, 35: 2, 8: 3, 9: 4}


@pytest.mark.parametrize("sizes", [(6, 3), (6, 5), (9,), (11,)])
def test_prefixes_of_another_length_than_the_service_named_are_not_written(sizes: tuple[int, ...]) -> None:
    """Shorter ones would leave other requests' keys in the last slots, and longer ones would lose their end."""
    layers = _layer(0, 4), _layer(0, 4)
    with pytest.raises(InvalidResponse, match=f"{sum(sizes)} virtual tokens, and the service named 10"):
        _worker(*layers)._write(Load("r", 1, 4, 10, ([3, 5, 9],)), [_prefix(size) for size in sizes])
    assert not any(layer.module.kv_cache.any() for layer in layers)


@pytest.mark.parametrize("blocks", [[], [0, 0], [0]])
def test_a_group_that_keeps_nothing_of_a_prefix_gets_nothing(blocks: list[int]) -> None:
    """Behind a prefix that ends with a chunk, a layer of chunked attention has no block of it."""
    full, chunked = _layer(0, 4), _layer(1, 4)
    worker = _worker(full, chunked)
    worker._write(Load("r", 1, 0, 8, ([3, 5], blocks)), [_prefix(8)])
    assert len(_written(full)) == 8
    assert _written(chunked) == {}


def test_a_request_that_is_not_written_fails_when_the_scheduler_knows_why() -> None:
    """Its reason is reported in the step that tried to write it, and the request as failed in the next one."""
    worker = _worker(_layer(0, 4), _layer(0, 4))
    arrived: Future[Any] = Future()
    arrived.set_result([_prefix(3)])
    worker._parcels[1] = arrived
    worker.start(Orders(loads=[Load("short", 1, 0, 4, ([1],)), Load("r", 1, 0, 3, ([2],)), Load("refused", None)]))
    assert worker.finish() == ({"r", "refused"}, {"refused"})
    assert {name: type(error) for name, error in worker.reports().unwritten.items()} == {"short": InvalidResponse}
    assert worker.finish() == ({"short"}, {"short"})
    assert worker.reports() == Reports()
    assert worker.finish() == (set(), set())


def test_narrower_layers_get_a_part_of_the_prefix_where_layers_differ() -> None:
    """A layer takes its heads and head size from the front, as in PEFT."""
    model = Model(num_layers=2, num_kv_heads=2, head_dim=4, dtype="float32", max_length=64, layers_differ=True)
    wide, narrow = _layer(0, 4), _layer(1, 4, heads=1, size=2)
    worker = _worker(wide, narrow, model=model)
    worker._write(Load("r", 1, 0, 3, ([1], [2])), [_prefix(3, heads=3, size=6)])
    assert _written(wide) == {4: 1, 5: 2, 6: 3}
    assert _written(narrow) == {8: 1, 9: 2, 10: 3}
    for layer in (_layer(1, 4, heads=3), _layer(1, 4, size=6)):
        with pytest.raises(InvalidRequest, match="layer 1 of this rank has"):
            _worker(wide, layer, model=model)


def test_keys_take_the_order_in_which_vllm_keeps_them() -> None:
    """Where vLLM reorders a head's keys when it loads the weights (Llama 4), those of a prefix follow; values stay."""
    model = Model(num_layers=2, num_kv_heads=2, head_dim=4, dtype="float32", max_length=64, evens_first=True)
    layers = _layer(0, 4), _layer(0, 4)
    head = torch.arange(1.0, 5.0).expand(2, 2, 2, 1, 4)  # layers, keys and values, heads, one token
    prefix: Any = SimpleNamespace(kv=SimpleNamespace(tensor=head))
    _worker(*layers, model=model)._write(Load("r", 1, 0, 1, ([1],)), [prefix])
    for layer in layers:
        keys, values = layer.module.kv_cache
        assert (keys[4].tolist(), values[4].tolist()) == ([[1, 3, 2, 4]] * 2, [[1, 2, 3, 4]] * 2)


def test_layers_that_a_prefix_does_not_fit_end_the_start() -> None:
    """A layer of another shape, a layer without attention, and a backend that cannot write are refused."""
    with pytest.raises(InvalidRequest, match="layer 1 of this rank has 1 key/value heads of size 4"):
        _worker(_layer(0, 4), _layer(0, 4, heads=1))
    with pytest.raises(InvalidRequest, match="the attention backend of layer 0, SimpleNamespace, cannot write"):
        _worker(_layer(0, 4, backend=SimpleNamespace()))
    source: Any = SimpleNamespace(close=None)
    with pytest.raises(InvalidRequest, match=r"attention in every layer, and found it in \[0, 2\]"):
        WorkerHalf(source, _MODEL, (0, 2), 1 << 20).register({0: _layer(0, 4), 2: _layer(0, 4)})
