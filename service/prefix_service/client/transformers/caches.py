"""Puts a prefix into the caches of Hugging Face transformers, in the form that each architecture needs.

The forms were read in PEFT 0.21.2 (`PeftModel.get_prompt`, `_get_layer_kv_target_shape`).
"""

from collections.abc import Sequence
from inspect import signature
from typing import Any

from torch import Tensor
from transformers import MODEL_MAPPING, Cache, DynamicCache, EncoderDecoderCache, PreTrainedConfig, PreTrainedModel

from prefix_service.client.transformers.devices import to_layer_devices, unwrapped
from prefix_service.client.transformers.static_cache import empty_static_cache
from prefix_service.errors import DimensionMismatch, InvalidRequest

Pairs = Sequence[tuple[Tensor, Tensor]]
"""One `(key, value)` per layer, each `[B, H, N, D]`; rows may share memory."""
Shape = tuple[int | None, int | None]
"""(heads, head size) as a layer caches them; None if the config has no single number."""

_FILLED_BY_CONFIG = ("gemma2", "gemma3", "gemma4")
_KEYS_AND_VALUES = (
    "full_attention",
    "sliding_attention",
    "reference_sliding_attention",
    "chunked_attention",
    "moe",
    "mlp",
)
"""transformers' types of layers that keep keys and values, or nothing."""


def to_cache(
    past_key_values: Pairs, config: PreTrainedConfig | PreTrainedModel, max_cache_len: int | None = None
) -> Cache:
    """Returns the cache that a model continues from, as PEFT's `get_prompt` builds it.

    With the model's config, keys and values keep their device and dtype. With the model itself, they take its dtype,
    and the keys and values of each layer go to the device on which that layer computes, even if the model is spread
    over several devices or offloaded (`device_map`), or wrapped by `torch.compile` or PEFT's LoRA.

    `past_key_values` has a `[B, H, N, D]` key and value of any float dtype per layer (the decoder's, in served order),
    in the adapter's dimensions. They are copied, so views are allowed and never written to. Most models get a
    `DynamicCache`; Gemma 2 to 4 get one that knows its sliding layers, and Gemma 4's layers are sliced, or left out if
    they are wider than the prefix; encoder-decoder models get an `EncoderDecoderCache`, with the prefix in the
    decoder's self-attention and nothing in its cross-attention. Encoders such as BERT use the `DynamicCache` too.

    With `max_cache_len`, the number of tokens that the cache has room for, including the prefix, it is a `StaticCache`
    instead (the decoder's self-attention), for `torch.compile`: its shapes are the same for each adapter and each step.

    Raises:
        DimensionMismatch: the number of layers, the heads or the head size are not the model's.
        InvalidRequest: `max_cache_len` leaves no room behind the prefix, the architecture has no static cache, a layer
            keeps something other than keys and values (state-space layers, latent attention), the architecture takes no
            cache (RWKV), or the layers of a model that is spread over devices cannot be found.
    """
    model: Any = None if isinstance(config, PreTrainedConfig) else unwrapped(config)
    config = config if isinstance(config, PreTrainedConfig) else model.config
    check_takes_prefix(config)
    decoder = config.get_text_config(decoder=True)
    layers = _num_layers(decoder)
    # PEFT counts the encoder's layers: a shallower decoder leaves pairs unused, a deeper one cannot be filled.
    if len(past_key_values) < layers or (len(past_key_values) > layers and not config.is_encoder_decoder):
        raise DimensionMismatch(f"the prefix has {len(past_key_values)} layers, the model has {layers}")
    if model is not None:
        past_key_values = to_layer_devices(past_key_values, model, layers)
    tokens = past_key_values[0][0].shape[2]
    static = None if max_cache_len is None else empty_static_cache(decoder, tokens, max_cache_len)
    if decoder.model_type.startswith(_FILLED_BY_CONFIG):
        targets, _ = _targets(past_key_values[0][0], decoder)
        return _filled(static or DynamicCache(config=decoder), past_key_values, targets)
    for layer, (key, _) in enumerate(past_key_values[:layers]):
        _check_shape(key, _layer_shape(decoder, layer), layer)
    cache: Cache = DynamicCache(past_key_values)
    if static is not None:
        cache = _filled(static, past_key_values, dict.fromkeys(range(layers), (None, None)))
    return EncoderDecoderCache(cache, DynamicCache()) if config.is_encoder_decoder else cache


def check_takes_prefix(config: PreTrainedConfig) -> None:
    """Checks that a model of `config` takes a prefix, of whatever dimensions.

    Raises:
        InvalidRequest: a layer keeps something other than keys and values (state-space layers, latent attention), or
            the architecture takes no cache (RWKV).
    """
    decoder = config.get_text_config(decoder=True)
    _check_takes_cache(config, decoder)
    _check_layers(decoder)


def provisioned(config: PreTrainedConfig) -> tuple[int, int, int]:
    """Returns the layers, heads and head size of a prefix that has room for every layer of a model's decoder.

    Raises:
        InvalidRequest: the config does not give the heads and the head size of a layer as numbers.
    """
    decoder = config.get_text_config(decoder=True)
    shapes = [_layer_shape(decoder, layer) for layer in range(_num_layers(decoder))]
    heads, sizes = ([number for number in numbers if number is not None] for numbers in zip(*shapes, strict=True))
    if len(heads) < len(shapes) or len(sizes) < len(shapes):
        raise InvalidRequest(f"the config of {decoder.model_type} does not give the heads and head size of its layers")
    return len(shapes), max(heads), max(sizes)


def skips_layers(past_key_values: Pairs, config: PreTrainedConfig) -> bool:
    """Returns whether a model of `config` has layers that go without the prefix because they are wider (Gemma 4)."""
    decoder = config.get_text_config(decoder=True)
    return decoder.model_type.startswith(_FILLED_BY_CONFIG) and bool(_targets(past_key_values[0][0], decoder)[1])


def _num_layers(decoder: PreTrainedConfig) -> int:
    """Returns the number of the decoder's layers; T5 has a separate name for it."""
    own = getattr(decoder, "num_decoder_layers", None) if decoder.is_encoder_decoder else None
    return int(own or decoder.num_hidden_layers)


def _check_takes_cache(*configs: PreTrainedConfig) -> None:
    """Raises InvalidRequest if transformers' models of these configs take no cache, and would ignore one (RWKV)."""
    mapping: Any = MODEL_MAPPING
    found = [mapping.get(type(config), None) for config in configs]
    known: list[Any] = [model for model in found if isinstance(model, type)]
    if known and not any("past_key_values" in signature(model.forward).parameters for model in known):
        raise InvalidRequest(f"{known[0].__name__} takes no past_key_values, so that no prefix fits")


def _check_layers(decoder: PreTrainedConfig) -> None:
    """Raises InvalidRequest if a layer keeps something other than keys and values."""
    if getattr(decoder, "kv_lora_rank", None) is not None:
        raise InvalidRequest(f"{decoder.model_type} keeps compressed keys and values, which a prefix does not fit")
    for number, kind in enumerate(getattr(decoder, "layer_types", None) or ()):
        if kind not in _KEYS_AND_VALUES:
            raise InvalidRequest(
                f"layer {number} of {decoder.model_type} is of type {kind}, which keeps more than keys and values: a "
                "prefix does not fit"
            )


def _layer_shape(decoder: PreTrainedConfig, layer: int) -> Shape:
    per_layer = getattr(decoder, "per_layer_config", ())  # the decoder's own config, unless layers differ
    config = per_layer[layer] if layer < len(per_layer) else decoder
    heads = getattr(config, "num_attention_heads", None)
    head_dim = getattr(config, "head_dim", None) or getattr(config, "d_kv", None)
    if head_dim is None and isinstance(heads, int) and isinstance(getattr(config, "hidden_size", None), int):
        head_dim = config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if config.model_type == "gpt_bigcode" and config.multi_query:
        kv_heads = 1
    if config.model_type == "falcon" and not config.new_decoder_architecture:  # the new architecture caches all heads
        kv_heads = 1 if config.multi_query else config.num_kv_heads
    return kv_heads if isinstance(kv_heads, int) else None, head_dim if isinstance(head_dim, int) else None


def _check_shape(key: Tensor, shape: Shape, layer: int) -> None:
    found = key.shape[1], key.shape[3]
    if any(want not in (None, have) for want, have in zip(shape, found, strict=True)):
        raise DimensionMismatch(
            f"the prefix has {found[0]} key/value heads of size {found[1]}, "
            f"layer {layer} of the model has {shape[0]} of size {shape[1]}"
        )


def _targets(key: Tensor, decoder: PreTrainedConfig) -> tuple[dict[int, Shape], list[int]]:
    """Returns the shape of each layer that takes the prefix, and the wider layers, which go without it (Gemma 4).

    The last layers of a model may share the keys of an earlier one; they are in neither.
    """
    own = _num_layers(decoder) - (getattr(decoder, "num_kv_shared_layers", None) or 0)
    shapes = {layer: _layer_shape(decoder, layer) for layer in range(own)}
    if len(set(shapes.values())) == 1:
        _check_shape(key, shapes[0], 0)
    wider = [n for n, (heads, dim) in shapes.items() if (heads or 0) > key.shape[1] or (dim or 0) > key.shape[3]]
    if len(wider) == len(shapes):
        _check_shape(key, shapes[0], 0)
    return {layer: shape for layer, shape in shapes.items() if layer not in wider}, wider


def _filled(cache: Cache, pairs: Pairs, targets: dict[int, Shape]) -> Cache:
    """Fills a cache through `update`, with all virtual tokens: sliding
    layers trim themselves, but count all of them.
    """
    for layer, (heads, dim) in targets.items():
        key, value = (tensor[:, :heads, :, :dim] for tensor in pairs[layer])
        cache.update(key, value, layer)
    return cache
