"""Writes a prefix by the code of vLLM's attention backends for GPUs, on the CPU. .venv-vllm's Python runs it.

A backend's `do_kv_cache_update` finds keys and values in a cache, whose memory may have any of several layouts, and
calls a kernel for CUDA. Here the code is vLLM's, and torch stands for the kernel: `key_cache[slot // block_size, slot %
block_size] = key`, as vLLM's `triton_reshape_and_cache_flash.py` does.
"""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, Final
from unittest.mock import MagicMock, patch

import torch

_LAYERS: Final = 2
_BLOCKS: Final = 6
_BLOCK_SIZE: Final = 32  # tokens
_HEADS: Final = 2
_HEAD_SIZE: Final = 16
_TOKENS: Final = 45
_GIVEN: Final = [4, 2]
"""The blocks that a request was given, in order."""
_BACKENDS: Final = {
    "flash_attn": "FlashAttentionImpl",
    "flashinfer": "FlashInferImpl",
    "triton_attn": "TritonAttentionImpl",
    "flex_attention": "FlexAttentionImpl",
}
_FLASHINFER: Final = ("flashinfer", "flashinfer.decode", "flashinfer.prefill", "flashinfer.utils")
"""Modules that no CPU has; only kernels come from them."""


def written() -> dict[str, str]:
    """Returns, for each backend, layout, size of the kernel's blocks and dtype of the cache, `right` or what is wrong.

    vLLM may give a kernel smaller blocks than it counts with; the slots of tokens stay the same.
    """
    found = {}
    with _without_kernels():
        for module, name in _BACKENDS.items():
            backend = getattr(importlib.import_module(f"vllm.v1.attention.backends.{module}"), name)
            for layout in _layouts():
                for kernel_block in (_BLOCK_SIZE, _BLOCK_SIZE // 2):
                    for dtype in ("auto", "fp8"):
                        case = f"{module}, {layout}, blocks of {kernel_block}, {dtype}"
                        found[case] = _try(backend, layout, kernel_block, dtype)
    return found


def _layouts() -> list[str]:
    from vllm.v1.kv_cache_layout import KVCacheLayout

    return [layout.name for layout in KVCacheLayout]


@contextmanager
def _without_kernels() -> Iterator[None]:
    """Has torch write in place of CUDA's and Triton's kernels while the block runs."""
    absent = {name: MagicMock() for name in _FLASHINFER if name not in sys.modules}
    operations = SimpleNamespace(reshape_and_cache_flash=_write)
    with patch.dict(sys.modules, absent), patch.object(torch.ops, "_C_cache_ops", operations, create=True):
        flash = importlib.import_module("vllm.v1.attention.backends.flash_attn")
        triton = importlib.import_module("vllm.v1.attention.backends.triton_attn")
        with (
            patch.object(flash, "reshape_and_cache_flash", _write, create=True),
            patch.object(triton, "triton_reshape_and_cache_flash", _write),
        ):
            yield


def _write(
    key: Any, value: Any, key_cache: Any, value_cache: Any, slots: Any, dtype: str, key_scale: Any, value_scale: Any
) -> None:
    # (tokens, heads, size) into (blocks, tokens of a block, heads, size)
    size = key_cache.shape[1]
    for new, cache, scale in ((key, key_cache, key_scale), (value, value_cache, value_scale)):
        if dtype == "fp8":
            stored, place = (new.float() / scale).to(torch.float8_e4m3fn).view(torch.uint8), cache.view(torch.uint8)
        else:
            stored, place = new, cache
        place[slots // size, slots % size] = stored


def _try(backend: Any, layout: str, kernel_block: int, dtype: str) -> str:
    from prefix_service.client.vllm.model import Model
    from prefix_service.client.vllm.shelf import Load
    from prefix_service.client.vllm.worker import Layer, WorkerHalf

    stored = torch.uint8 if dtype == "fp8" else torch.bfloat16
    caches = _caches(layout, kernel_block, stored)
    layers = {}
    for number, cache in enumerate(caches):
        scales = {"_k_scale": torch.tensor(0.5), "_v_scale": torch.tensor(2.0)}
        module = SimpleNamespace(
            impl=_implementation(backend, dtype), kv_cache=cache, num_kv_heads=_HEADS, head_size=_HEAD_SIZE, **scales
        )
        layers[number] = Layer(module, 0, _BLOCK_SIZE)
    source: Any = None
    worker = WorkerHalf(source, Model(_LAYERS, _HEADS, _HEAD_SIZE, "bfloat16", 64), (0, _HEADS), 1 << 20)
    worker.register(layers)
    kv = torch.randn(_LAYERS, 2, _HEADS, _TOKENS, _HEAD_SIZE, generator=torch.Generator().manual_seed(0)).bfloat16()
    prefix: Any = SimpleNamespace(kv=SimpleNamespace(tensor=kv))
    try:
        worker._write(Load("r", 1, 0, _TOKENS, [_GIVEN]), [prefix])
    except Exception as error:  # noqa: BLE001 - the test compares its words
        return f"{type(error).__name__}: {error}"
    return _compared(caches, kv, kernel_block, dtype)


def _caches(layout: str, kernel_block: int, dtype: torch.dtype) -> list[Any]:
    """Returns the cache of each layer as a backend sees it, `(blocks, heads, tokens, 2 * size)`, in memory of a
    layout."""
    from vllm.v1.kv_cache_layout import KVCacheLayout

    order = KVCacheLayout[layout].stride_order
    shape = (_LAYERS, _BLOCKS * _BLOCK_SIZE // kernel_block, _HEADS, kernel_block, 2 * _HEAD_SIZE)
    memory = torch.zeros([shape[axis] for axis in order], dtype=dtype)
    logical = memory.permute([order.index(axis) for axis in range(len(order))])
    assert logical.shape == shape
    return list(logical)


def _implementation(backend: Any, dtype: str) -> Any:
    """Returns a backend's implementation with the fields that its writer reads; its constructor asks for a GPU."""
    made = object.__new__(backend)
    fields = {
        "attn_type": "decoder",
        "head_size": _HEAD_SIZE,
        "num_kv_heads": _HEADS,
        "kv_cache_dtype": dtype,
        "cache_dtype": dtype,
        "fp8_dtype": torch.float8_e4m3fn,
        "kv_sharing_target_layer_name": None,
        "nvfp4_fa2": False,
        "is_kvcache_nvfp4": False,
        "_is_per_token_head_quant": False,
    }
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def _compared(caches: list[Any], kv: Any, kernel_block: int, dtype: str) -> str:
    places = [(_GIVEN[token // _BLOCK_SIZE], token % _BLOCK_SIZE) for token in range(_TOKENS)]
    for layer, cache in enumerate(caches):
        expected = torch.zeros_like(cache, memory_format=torch.contiguous_format)
        for token, (block, offset) in enumerate(places):
            slot = block * _BLOCK_SIZE + offset
            key, value = kv[layer, :, :, token]
            if dtype == "fp8":
                key, value = ((one.float() / scale).to(torch.float8_e4m3fn) for one, scale in ((key, 0.5), (value, 2)))
                key, value = key.view(torch.uint8), value.view(torch.uint8)
            expected[slot // kernel_block, :, slot % kernel_block] = torch.cat([key, value], -1)
        if not torch.equal(cache.contiguous(), expected):
            return f"layer {layer} holds something else"
    return "right"
