"""A prefix in Hugging Face transformers: its own cache classes, and its own `generate`.

What a cache looks like was read in PEFT 0.21.2 (`PeftModel.get_prompt`, `_get_layer_kv_target_shape`) and transformers
5.23.0 (`cache_utils`); what generation needs, in transformers' `GenerationMixin._prefill`: with a filled cache, the
input ids are the new tokens alone as soon as the mask is longer than they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from service.errors import DimensionMismatch, InvalidRequest
from service.prefix.kv import position_ids

Pairs = Sequence[tuple[Tensor, Tensor]]
"""One `(key, value)` a layer, each `[B, H, N, D]`; rows may share memory."""

_FILLED_BY_CONFIG = ("gemma2", "gemma3", "gemma4")
_PER_TOKEN = ("position_ids", "token_type_ids", "mm_token_type_ids")


def to_cache(past_key_values: Pairs, config: PreTrainedConfig) -> Cache:
    """The cache that a model of `config` continues from, as PEFT's `get_prompt` builds it.

    `past_key_values` has a `[B, H, N, D]` key and value for each layer (of the decoder, in served order), as
    provisioned by the adapter; they are copied, so that views are welcome and never written to. Most models get a
    `DynamicCache`; Gemma 2 to 4 one that knows their sliding layers, with Gemma 4's layers sliced or left out where
    their shape is not the provisioned one; encoder-decoder models an `EncoderDecoderCache` with the prefix in the
    decoder's self-attention and nothing in its cross-attention.

    Raises:
        DimensionMismatch: the number of layers, the heads or the head size are not the model's.
    """
    decoder = config.get_text_config(decoder=True)
    layers = _decoder_layers(decoder)
    _check_layers(past_key_values, layers, exactly=not config.is_encoder_decoder)
    if decoder.model_type.startswith(_FILLED_BY_CONFIG):
        return _filled_by_config(past_key_values, decoder)
    for layer, (key, _) in enumerate(past_key_values[:layers]):
        _check_shape(key, _layer_shape(decoder, layer), layer)
    cache = DynamicCache(past_key_values)
    return EncoderDecoderCache(cache, DynamicCache()) if config.is_encoder_decoder else cache


def generate(
    model: PreTrainedModel,
    past_key_values: Pairs,
    input_ids: Tensor | None = None,
    *,
    attention_mask: Tensor | None = None,
    prefix_mask: Tensor | None = None,
    **options: Any,
) -> Tensor | ModelOutput:
    """`model.generate` behind a prefix: what the caller would get from PEFT's `generate`, with any padding.

    `past_key_values` are pairs `[1, H, N, D]`, shared by all rows, or `[B, H, N, D]`, one prefix a row; they are
    brought to the model's device and dtype. `input_ids` is int64 `[B, S]`, the encoder's input for an encoder-decoder
    model; `attention_mask` `[B, S]` belongs to it (the default is transformers' own: zeros where there is padding that
    can be told apart, else ones). `prefix_mask` `[B, N]` (default ones) has zeros where a row's prefix is shorter.
    `options` are those of `model.generate`.

    The result is that of `model.generate`: `[B * num_return_sequences, S + new]`, in each row the caller's input ids
    as they came, padding included, followed by the new tokens; or transformers' output object, with such `sequences`.

    Left-padded rows equal PEFT's. Rows padded on the right, or anywhere else, equal each row on its own: they are
    padded on the left for the model. Where a sliding window is so short that padding between prefix and input would
    push the prefix out of it, rows of equal length are generated together, one length after the other.

    Raises:
        DimensionMismatch: as `to_cache`.
        InvalidRequest: no input ids, a mask of another shape, a cache of the caller's own (static caches hold no
            prefix), an assistant model (it has no prefix), or an option that generation length by length cannot serve.
    """
    _refuse(model, options)
    ids = input_ids if input_ids is not None else options.pop("inputs", None)
    if ids is None:
        raise InvalidRequest("generate needs input_ids; inputs_embeds alone cannot follow a prefix")
    prefix = _Prefix.for_batch(past_key_values, prefix_mask, ids.shape[0])
    if _option(model, options, "use_cache") is False:
        options["use_cache"] = True  # the prefix lives in the cache
    if model.config.is_encoder_decoder:
        return _generate_encoder_decoder(model, prefix, ids, options | {"attention_mask": attention_mask})
    return _generate_decoder(model, prefix, ids, _mask(model, ids, attention_mask, options), options)


# --- The cache ---


def _decoder_layers(config: PreTrainedConfig) -> int:
    """The decoder's layers; T5 counts them under a name of their own."""
    layers = (getattr(config, "num_decoder_layers", None) if config.is_encoder_decoder else None) or (
        config.num_hidden_layers
    )
    return int(layers)


def _check_layers(pairs: Pairs, layers: int, *, exactly: bool) -> None:
    """PEFT counts an encoder's layers, so that a shallower decoder leaves pairs unused; a deeper one it cannot fill."""
    if len(pairs) < layers or (exactly and len(pairs) != layers):
        raise DimensionMismatch(f"the prefix has {len(pairs)} layers, the model has {layers}")


def _check_shape(key: Tensor, shape: tuple[int | None, int | None], layer: int) -> None:
    found = key.shape[1], key.shape[3]
    if any(want is not None and want != have for want, have in zip(shape, found, strict=True)):
        raise DimensionMismatch(
            f"the prefix has {found[0]} key/value heads of size {found[1]}, "
            f"the model has {shape[0]} of size {shape[1]} in layer {layer}"
        )


def _layer_shape(config: PreTrainedConfig, layer: int) -> tuple[int | None, int | None]:
    """(heads, head size) as layer `layer` caches them; None for what the config does not tell in one number."""
    per_layer = getattr(config, "per_layer_config", None)
    own = config if per_layer is None or layer >= len(per_layer) else per_layer[layer]
    heads = getattr(own, "num_attention_heads", None)
    head_dim = getattr(own, "head_dim", None) or getattr(own, "d_kv", None)
    if head_dim is None and isinstance(heads, int) and isinstance(getattr(own, "hidden_size", None), int):
        head_dim = own.hidden_size // heads
    kv_heads = getattr(own, "num_key_value_heads", None) or heads
    if own.model_type == "gpt_bigcode" and own.multi_query:
        kv_heads = 1
    if own.model_type == "falcon" and not own.new_decoder_architecture:  # the new one caches every head
        kv_heads = 1 if own.multi_query else own.num_kv_heads
    return (kv_heads if isinstance(kv_heads, int) else None), (head_dim if isinstance(head_dim, int) else None)


def _filled_by_config(pairs: Pairs, config: PreTrainedConfig) -> DynamicCache:
    """Through `update`, with all virtual tokens: sliding layers trim themselves and still count them all."""
    cache = DynamicCache(config=config)
    shapes = [_layer_shape(config, layer) for layer in range(len(pairs))]
    uniform = len(set(shapes)) == 1
    own_layers = config.num_hidden_layers - (getattr(config, "num_kv_shared_layers", None) or 0)
    filled = 0
    for layer, (key, value) in enumerate(pairs[:own_layers]):  # the layers behind share an earlier layer's keys
        if uniform:
            _check_shape(key, shapes[layer], layer)
        heads, dim = (want or have for want, have in zip(shapes[layer], (key.shape[1], key.shape[3]), strict=True))
        if heads <= key.shape[1] and dim <= key.shape[3]:
            cache.update(key[:, :heads, :, :dim], value[:, :heads, :, :dim], layer)
            filled += 1
    if not filled:
        key = pairs[0][0]
        raise DimensionMismatch(
            f"the prefix has {key.shape[1]} key/value heads of size {key.shape[3]}, "
            f"every layer of the model is wider: {sorted(set(shapes[:own_layers]), key=str)}"
        )
    return cache


# --- Generation ---


@dataclass(frozen=True)
class _Prefix:
    """Pairs of batch 1 or B, and the mask over their virtual tokens, `[B, N]`."""

    pairs: Pairs
    mask: Tensor

    @classmethod
    def for_batch(cls, pairs: Pairs, mask: Tensor | None, batch_size: int) -> "_Prefix":
        rows, _, tokens, _ = pairs[0][0].shape
        if rows not in (1, batch_size):
            raise InvalidRequest(f"the prefix has {rows} rows, input_ids has {batch_size}")
        if mask is None:
            mask = torch.ones(batch_size, tokens, dtype=torch.int64)
        if mask.shape != (batch_size, tokens):
            raise InvalidRequest(f"prefix_mask must be {[batch_size, tokens]}, got {list(mask.shape)}")
        return cls(pairs, mask)

    def select(self, rows: Tensor) -> "_Prefix":
        """These rows of the batch."""
        shared = self.pairs[0][0].shape[0] == 1 and self.mask.shape[0] > 1
        pairs = self.pairs if shared else [(key[rows], value[rows]) for key, value in self.pairs]
        return replace(self, pairs=pairs, mask=self.mask[rows])

    def cache(self, model: PreTrainedModel, repeats: int) -> Cache:
        """For each row of the batch `repeats` rows, one behind the other, as transformers repeats its inputs."""
        total = self.mask.shape[0] * repeats

        def rows(tensor: Tensor) -> Tensor:
            tensor = tensor.to(model.device, model.dtype)
            if tensor.shape[0] == 1:
                return tensor.expand(total, -1, -1, -1)
            return tensor.repeat_interleave(repeats, dim=0)

        return to_cache([(rows(key), rows(value)) for key, value in self.pairs], model.config)


def _refuse(model: PreTrainedModel, options: dict[str, Any]) -> None:
    if options.get("past_key_values") is not None:
        raise InvalidRequest("generate fills the cache with the prefix; past_key_values cannot be given as well")
    if options.get("assistant_model") is not None:
        raise InvalidRequest("an assistant_model would draft without the prefix; generate without one")
    if options.get("inputs_embeds") is not None:
        raise InvalidRequest("inputs_embeds cannot follow a prefix; give input_ids")
    implementation = _option(model, options, "cache_implementation")
    if implementation not in (None, "hybrid"):  # transformers itself reads "hybrid" as none
        raise InvalidRequest(f"a prefix needs transformers' dynamic cache, not cache_implementation={implementation!r}")


def _option(model: PreTrainedModel, options: dict[str, Any], name: str) -> Any:
    """A generation option, with transformers' precedence: the call, the call's config, the model's config."""
    if options.get(name) is not None:
        return options[name]
    configs = (options.get("generation_config"), model.generation_config)
    return next((value for config in configs if (value := getattr(config, name, None)) is not None), None)


def _repeats(model: PreTrainedModel, options: dict[str, Any]) -> int:
    """How many rows transformers makes of each input row."""
    return max(_option(model, options, name) or 1 for name in ("num_beams", "num_return_sequences"))


def _mask(model: PreTrainedModel, ids: Tensor, mask: Tensor | None, options: dict[str, Any]) -> Tensor:
    """The input's mask, int64 `[B, S]`: the caller's, or what transformers infers from the padding."""
    if mask is None:
        pad, eos = (_option(model, options, name) for name in ("pad_token_id", "eos_token_id"))
        ends = eos if isinstance(eos, list | tuple) else [eos]
        return torch.ones_like(ids) if pad is None or pad in ends else ids.ne(pad).to(torch.int64)
    if mask.shape != ids.shape:
        raise InvalidRequest(f"attention_mask must be {list(ids.shape)} as input_ids, got {list(mask.shape)}")
    return mask.to(ids.device, torch.int64)


def _generate_encoder_decoder(model: PreTrainedModel, prefix: _Prefix, ids: Tensor, options: dict[str, Any]) -> Any:
    """No dummy ids, no positions: the decoder starts where its cache ends. The encoder's mask stays as it is."""
    mask = options.get("decoder_attention_mask")
    if mask is None and not prefix.mask.all():
        start = options.get("decoder_input_ids")
        mask = prefix.mask.new_ones(ids.shape[0], 1 if start is None else start.shape[1])
    if mask is not None:
        options["decoder_attention_mask"] = torch.cat([prefix.mask.to(mask), mask], dim=1).to(ids.device)
    return model.generate(ids, past_key_values=prefix.cache(model, _repeats(model, options)), **options)


def _generate_decoder(
    model: PreTrainedModel, prefix: _Prefix, ids: Tensor, mask: Tensor, options: dict[str, Any]
) -> Any:
    if bool((mask[:, 1:] >= mask[:, :-1]).all()):
        # Float as PEFT's: Falcon rounds its ALiBi to bfloat16 with an integer mask, as it does for a row on its own.
        return _continue(model, prefix, ids, mask.to(torch.float32), options)
    if _padding_leaves_window(model, prefix, ids, options):
        return _generate_by_length(model, prefix, ids, mask, options)
    order = mask.argsort(dim=1, stable=True)  # (B, S): padding first, then the tokens in their order
    moved = {name: options[name].gather(1, order) for name in _PER_TOKEN if options.get(name) is not None}
    output = _continue(model, prefix, ids.gather(1, order), mask.gather(1, order), options | moved)
    return _behind(ids, output, _option(model, options, "num_return_sequences") or 1)


def _continue(model: PreTrainedModel, prefix: _Prefix, ids: Tensor, mask: Tensor, options: dict[str, Any]) -> Any:
    """`model.generate` on rows padded on the left."""
    options = dict(options)
    if "position_ids" in signature(model.forward).parameters:
        given = options.get("position_ids")
        own = position_ids(mask, 0) if given is None else given
        options["position_ids"] = own + prefix.mask.to(own).sum(dim=1, keepdim=True)
    whole = torch.cat([prefix.mask.to(mask), mask], dim=1)  # (B, N + S)
    cache = prefix.cache(model, _repeats(model, options))
    return model.generate(ids, attention_mask=whole, past_key_values=cache, **options)


def _behind(ids: Tensor, output: Any, repeats: int) -> Any:
    """`output` with the caller's own ids in front of the new tokens."""
    sequences = output if isinstance(output, Tensor) else output.sequences
    whole = torch.cat([ids.repeat_interleave(repeats, dim=0), sequences[:, ids.shape[1] :]], dim=1)
    if isinstance(output, Tensor):
        return whole
    output.sequences = whole
    return output


# --- Short sliding windows ---


def _padding_leaves_window(model: PreTrainedModel, prefix: _Prefix, ids: Tensor, options: dict[str, Any]) -> bool:
    """Windows count slots, not tokens: padding between prefix and input would push the prefix out."""
    layers = DynamicCache(config=model.config).layers
    window = min((layer.sliding_window for layer in layers if getattr(layer, "is_sliding", False)), default=None)
    new, limit = (_option(model, options, name) for name in ("max_new_tokens", "max_length"))
    end = ids.shape[1] + new if new is not None else limit or ids.shape[1] + 20  # 20: transformers' default
    return window is not None and prefix.mask.shape[1] + end > window


def _generate_by_length(
    model: PreTrainedModel, prefix: _Prefix, ids: Tensor, mask: Tensor, options: dict[str, Any]
) -> Tensor:
    """Rows of one length at a time, without any padding."""
    _refuse_by_length(model, mask, options)
    repeats = _option(model, options, "num_return_sequences") or 1
    lengths = mask.sum(dim=1)
    parts = []
    for length in lengths.unique().tolist():
        rows = (lengths == length).nonzero().flatten()
        own = ids[rows][mask[rows] == 1].view(-1, length)
        limits = _shortened(model, options, ids.shape[1] - length)
        new = _continue(model, prefix.select(rows), own, torch.ones_like(own), options | limits)[:, length:]
        parts.append(((rows[:, None] * repeats + torch.arange(repeats, device=rows.device)).flatten(), new))
    whole = ids.new_full((len(ids) * repeats, max(new.shape[1] for _, new in parts)), _pad_token(model, options))
    for rows, new in parts:
        whole[rows, : new.shape[1]] = new.to(whole.device)
    return torch.cat([ids.repeat_interleave(repeats, dim=0), whole], dim=1)


def _refuse_by_length(model: PreTrainedModel, mask: Tensor, options: dict[str, Any]) -> None:
    advice = "rows padded on the right are generated length by length in so short a sliding window; pad on the left"
    if _option(model, options, "return_dict_in_generate"):
        raise InvalidRequest(f"return_dict_in_generate cannot be served: {advice}")
    per_row = [
        name for name, value in options.items() if isinstance(value, Tensor) or name == "prefix_allowed_tokens_fn"
    ]
    if per_row:
        raise InvalidRequest(f"{', '.join(per_row)} cannot be served: {advice}")
    if not mask.any(dim=1).all():
        raise InvalidRequest("attention_mask has a row without a token")


def _shortened(model: PreTrainedModel, options: dict[str, Any], padding: int) -> dict[str, int]:
    """`max_length` counts padding: less of it where the padding is gone."""
    limit = _option(model, options, "max_length")
    counted = limit is not None and _option(model, options, "max_new_tokens") is None
    return {"max_length": limit - padding} if counted else {}


def _pad_token(model: PreTrainedModel, options: dict[str, Any]) -> int:
    """What transformers itself puts behind a finished row."""
    pad, eos = (_option(model, options, name) for name in ("pad_token_id", "eos_token_id"))
    first = eos[0] if isinstance(eos, list | tuple) else eos
    return int(pad if pad is not None else first or 0)
