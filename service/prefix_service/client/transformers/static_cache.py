"""transformers' static cache, which `torch.compile` needs: whether an architecture has one, and one that has room."""

from typing import Any

from transformers import MODEL_MAPPING, PreTrainedConfig, StaticCache

from prefix_service.errors import InvalidRequest


def empty_static_cache(config: PreTrainedConfig, num_virtual_tokens: int, max_cache_len: int) -> StaticCache:
    """Returns an empty `StaticCache` of a decoder of `config`, for `max_cache_len` tokens including the prefix.

    Each layer takes its memory, dtype and device from its first tokens.

    Raises:
        InvalidRequest: there is no room behind the prefix, or transformers compiles the architecture with no static
        cache.
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
    """Returns whether the model's class declares a static cache.

    A class that transformers does not know (from the Hub) is tried.
    """
    if config.model_type == "falcon" and config.alibi:  # the mask has the cache's length, the bias the input's
        return False
    model: Any = MODEL_MAPPING.get(type(config), None)
    return bool(getattr(model, "_can_compile_fullgraph", True))
