"""The adapter in vLLM's KV events, in the field of a LoRA's name: from these, routers learn which engine keeps what.

vLLM publishes the salt of a request's blocks in `extra_keys`. Whoever knows the salt of an adapter's blocks can send it
as the `cache_salt` of a plain prompt of placeholders, and is answered from these blocks, so events have a hash of it.

Read against vLLM 0.32.0, where `BlockPool` makes an event for the blocks of a request in each of three methods.
"""

import functools
from collections.abc import Callable
from typing import Any, Final

from prefix_service.client.vllm.salt import shown_salt

_METHODS: Final = ("cache_full_blocks", "cache_partial_block", "emit_cached_block_events")


def name_adapters(pool: Any, name_of: Callable[[str], str | None]) -> None:
    """Has a pool of blocks name the adapters in its events, and hide their salts; `name_of` returns the name for a
    request's id, if any.

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
                if getattr(event, "extra_keys", None) is not None:
                    event.extra_keys = [_without(request.cache_salt, keys) for keys in event.extra_keys]
        return result

    return named


def _without(salt: str, keys: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
    """Returns what was hashed beside a block's tokens, with a hash in place of the salt."""
    return keys and tuple(shown_salt(salt) if key == salt else key for key in keys)
