"""The adapter in vLLM's KV events, in the field of a LoRA's name: from these, routers learn which engine keeps what.

Read against vLLM 0.32.0, where `BlockPool` makes an event for the blocks of a request in each of three methods.
"""

import functools
from collections.abc import Callable
from typing import Any, Final

_METHODS: Final = ("cache_full_blocks", "cache_partial_block", "emit_cached_block_events")


def name_adapters(pool: Any, name_of: Callable[[str], str | None]) -> None:
    """Has a pool of blocks name the adapters in its events; `name_of` returns the name for a request's id, if any.

    The name of a LoRA stays. Does nothing if vLLM publishes no events.
    """
    if not pool.enable_kv_cache_events:
        return
    for method in _METHODS:
        if hasattr(pool, method):
            setattr(pool, method, _naming(getattr(pool, method), pool, name_of))


def _naming(method: Callable[..., Any], pool: Any, name_of: Callable[[str], str | None]) -> Callable[..., Any]:
    @functools.wraps(method)
    def named(request: Any, *arguments: Any, **more: Any) -> Any:
        before = len(pool.kv_event_queue)
        result = method(request, *arguments, **more)
        name = name_of(request.request_id)
        if name is not None:
            for event in pool.kv_event_queue[before:]:
                if getattr(event, "lora_name", name) is None:
                    event.lora_name = name
        return result

    return named
