"""transformers' static cache, which `torch.compile` takes: when a call wants one, and one that has room."""

from typing import Any

from transformers import MODEL_MAPPING, PreTrainedConfig, StaticCache

from prefix_service.errors import InvalidRequest


def empty_static_cache(config: PreTrainedConfig, num_virtual_tokens: int, max_cache_len: int) -> StaticCache:
    """A `StaticCache` for `max_cache_len` tokens of a decoder of `config`, the prefix among them; each layer takes its
    memory, dtype and device with its first tokens.

    Raises:
        InvalidRequest: no room behind the prefix, or an architecture that transformers compiles with no static cache.
    """
    if max_cache_len <= num_virtual_tokens:
        raise InvalidRequest(
            f"max_cache_len counts the {num_virtual_tokens} virtual tokens and all that follow, got {max_cache_len}"
        )
    if not _has_static_cache(config):
        raise InvalidRequest(
            f"transformers runs {config.model_type} models of this config with a dynamic cache alone, not a static one"
        )
    return StaticCache(config=config, max_cache_len=max_cache_len)


def _has_static_cache(config: PreTrainedConfig) -> bool:
    """What the model's class says of itself; one that transformers does not know (from the Hub) is tried."""
    if config.model_type == "falcon" and config.alibi:  # the mask has the cache's length there, the bias the input's
        return False
    model: Any = MODEL_MAPPING.get(type(config), None)
    return bool(getattr(model, "_can_compile_fullgraph", True))
