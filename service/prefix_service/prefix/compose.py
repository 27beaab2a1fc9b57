"""Concatenates prefixes into one CARTRIDGE adapter, as PEFT's `compose_cartridge_adapters` does."""

from collections.abc import Sequence
from typing import Final

from prefix_service.errors import InvalidRequest
from prefix_service.prefix.config import CartridgeConfig, PrefixConfig, parse_config

_COMMON: Final = ("task_type", "token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules")


def composed_config(named: Sequence[tuple[str, PrefixConfig]]) -> PrefixConfig:
    """Returns the config of a concatenation of the named prefixes, in their order.

    As in PEFT, it is the first prefix's config with the tokens of all prefixes, and with the frozen tokens (the
    attention sink) of the first alone. A PREFIX_TUNING prefix has no frozen tokens; fields of its projection are left
    out.

    Raises:
        InvalidRequest: a prefix differs from the first in a dimension or in its task.
        InvalidConfig: the concatenation has more tokens than a prefix may have.
    """
    first_name, first = named[0]
    for name, config in named[1:]:
        for field in _COMMON:
            found, wanted = getattr(config, field), getattr(first, field)
            if found != wanted:
                raise InvalidRequest(
                    f"{name} has {field} {found}, and {first_name} has {wanted}: they cannot be composed"
                )
    values = first.model_dump(exclude={"encoder_hidden_size", "prefix_projection", "init_weights"})
    return parse_config(
        {
            **values,
            "peft_type": "CARTRIDGE",
            "inference_mode": True,
            "num_virtual_tokens": sum(config.num_virtual_tokens for _, config in named),
            "num_frozen_tokens": first.num_frozen_tokens if isinstance(first, CartridgeConfig) else 0,
        }
    )
