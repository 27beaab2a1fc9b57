"""transformers' own `generate` behind a prefix, with any padding.

It relies on transformers 5.23.0 (`GenerationMixin._prefill`): behind a filled cache, input ids that are shorter than
the mask are the new tokens alone. No dummy ids stand for the prefix, so no logits processor, stopping criterion,
streamer or `max_length` counts them.
"""

from dataclasses import dataclass
from inspect import signature
from typing import Any, Self

import torch
from torch import Tensor
from transformers import Cache, EncoderDecoderCache, GenerationConfig, StaticCache

from prefix_service.client.transformers.caches import Pairs, skips_layers, to_cache
from prefix_service.client.transformers.continuation import ContinuationCheck
from prefix_service.client.transformers.devices import decoder_of, unwrapped
from prefix_service.client.transformers.padding import Model, follows_mask, moved, padding_shows
from prefix_service.errors import InvalidRequest
from prefix_service.prefix.kv import prefix_mask

Options = dict[str, Any]

_DEFAULT_NEW_TOKENS = 20  # transformers' own default


def generate(
    model: Model,
    past_key_values: Pairs,
    /,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *,
    prefix_mask: Tensor | None = None,
    **options: Any,
) -> Any:
    """Returns the result of `model.generate` behind a prefix, as PEFT's `generate` does, with any padding.

    `past_key_values` are pairs `[1, H, N, D]`, shared by all rows, or `[B, H, N, D]`, one prefix per row; they are
    converted to the model's dtype, and moved to the device of each layer. `model` may be wrapped by `torch.compile` or
    by PEFT's LoRA. `input_ids` is int64 `[B, S]`, the encoder's input for an encoder-decoder model. `attention_mask`
    `[B, S]` belongs to it; without one, pad ids are padding if transformers itself treats them so. `prefix_mask` `[B,
    N]` (default: ones) has zeros where a row's prefix is shorter. `options` are those of `model.generate`, including
    images; `use_cache=False` is ignored, since the prefix is in the cache, and so are `token_type_ids`, which PEFT
    drops in training too. The model computes its positions, unless they are given. With `cache_implementation="static"`
    the cache is a static one, sized for this call or for `max_cache_len` if that is more (prefix, input and new
    tokens): with one size for all calls, a compiled model is compiled once.

    The result is that of `model.generate`: int64 `[B * num_return_sequences, S + new]`, in each row the caller's input
    ids, including padding, then the new tokens (encoder-decoder models: the decoder's tokens alone); with
    `return_dict_in_generate`, transformers' output object with such `sequences`.

    With padding on the right, or anywhere else, each row equals that row on its own: the model sees it padded on the
    left. If that padding could change the row (`padding_shows`; layers without the prefix misread the mask), rows of
    one length are generated at a time. Left-padded rows equal those of PEFT, which lets such models count the padding,
    and lets the longest row of a batch determine the rotary frequencies of all (`dynamic` and `longrope`). An encoder's
    rows are passed on unchanged: BART's encoder counts padding on the left, with and without a prefix.

    Raises:
        DimensionMismatch: the prefix does not fit the model.
        InvalidRequest: there are no input ids; a mask has another shape; the caller passes a cache of its own, or an
            assistant model (which has no prefix); the architecture has no static cache, or no prefix fits it; the model
            does not continue from the prefix (Phi-3, if the input is longer than its first range of positions; models
            with
            a `generate` of their own); a row has no token; right padding comes with inputs that cannot be split by row;
            or
            another option cannot be used.
    """
    model = unwrapped(model)
    _refuse(model, options)
    options.pop("token_type_ids", None)  # as PEFT, in training and here
    ids = input_ids if input_ids is not None else options.pop("inputs", None)
    if ids is None:
        raise InvalidRequest("generate needs input_ids")
    prefix = _Prefix.of(past_key_values, prefix_mask, ids, _max_cache_len(model, past_key_values, ids, options))
    options = {name: value for name, value in options.items() if name != "max_cache_len"}
    if _option(model, options, "cache_implementation") is not None:
        options["cache_implementation"] = None  # transformers takes no other cache together with that choice
    if _option(model, options, "use_cache") is False:
        options["use_cache"] = True
    if model.config.is_encoder_decoder:
        return _generate_encoder_decoder(model, prefix, ids, options | {"attention_mask": attention_mask})
    return _generate_decoder(model, prefix, ids, _input_mask(model, ids, attention_mask, options), options)


@dataclass(frozen=True)
class _Prefix:
    """Pairs of batch 1 or B, the mask over their virtual tokens, int64 `[B, N]`, and the number of tokens that a static
    cache has room for.
    """

    pairs: Pairs
    mask: Tensor
    max_cache_len: int | None

    @classmethod
    def of(cls, pairs: Pairs, mask: Tensor | None, ids: Tensor, max_cache_len: int | None) -> Self:
        """Returns the prefix of a batch of input ids.

        Raises:
            InvalidRequest: prefix or mask do not fit the batch.
        """
        rows, _, tokens, _ = pairs[0][0].shape
        shape = len(ids), tokens
        if rows not in (1, len(ids)):
            raise InvalidRequest(f"the prefix has {rows} rows, input_ids has {len(ids)}")
        if mask is not None and mask.shape != shape:
            raise InvalidRequest(f"prefix_mask must be {list(shape)}, got {list(mask.shape)}")
        mask = prefix_mask(*shape) if mask is None else mask
        return cls(pairs, mask.to(ids.device, torch.int64), max_cache_len)

    def select(self, rows: Tensor) -> Self:
        """Returns these rows of the batch."""
        own = rows.to(self.pairs[0][0].device)
        shared = self.pairs[0][0].shape[0] == 1
        pairs = self.pairs if shared else [(key[own], value[own]) for key, value in self.pairs]
        return type(self)(pairs, self.mask[rows], self.max_cache_len)

    def cache(self, model: Model, options: Options) -> Cache:
        """Returns a cache with each row repeated consecutively, as transformers repeats the inputs."""
        repeats = max(_option(model, options, name) or 1 for name in ("num_beams", "num_return_sequences"))
        total = self.mask.shape[0] * repeats

        def rows(own: Tensor) -> Tensor:
            return own.expand(total, -1, -1, -1) if own.shape[0] == 1 else own.repeat_interleave(repeats, dim=0)

        return to_cache([(rows(key), rows(value)) for key, value in self.pairs], model, self.max_cache_len)

    def skips_layers(self, model: Model) -> bool:
        """Returns whether layers go without the prefix.

        They read the start of the mask as theirs, which zeros in it break.
        """
        return skips_layers(self.pairs, model.config)

    def extend(self, mask: Tensor) -> Tensor:
        """Returns the mask of prefix and input, `[B, S]` -> `[B, N + S]`."""
        return torch.cat([self.mask.to(mask), mask], dim=1)


def _option(model: Model, options: Options, name: str) -> Any:
    """Returns a generation option, with transformers' precedence: the call, the call's config, the model's config."""
    if name in options:
        return options[name]
    configs = options.get("generation_config"), model.generation_config
    return next((value for config in configs if (value := getattr(config, name, None)) is not None), None)


def _refuse(model: Model, options: Options) -> None:
    name = type(model).__name__
    if next(iter(signature(model.generate).parameters)) == "pixel_values":  # BLIP-2 and others with an inner model
        raise InvalidRequest(f"{name} has a generate of its own, for images first, which would not pass the prefix on")
    if not any("past_key_values" in signature(part.forward).parameters for part in (model, decoder_of(model))):
        raise InvalidRequest(f"{type(model).__name__} takes no past_key_values, so that no prefix fits")
    text = model.config.get_text_config(decoder=True)
    if options.get("cross_attention_mask") is not None and getattr(text, "cross_attention_layers", None):
        raise InvalidRequest(
            f"cross_attention_mask cannot be served behind a prefix: the prefix fills the cross-attention layers of "
            f"{type(model).__name__} too, and the mask has no place for it (PEFT fails there)"
        )
    reasons = {
        "past_key_values": "the prefix fills the cache",
        "assistant_model": "it would draft without the prefix",
        "inputs_embeds": "transformers would take the first of them for the prefix; give input_ids",
        "prefill_chunk_size": "transformers would count its chunks from the start of the cache",
    }
    for name, reason in reasons.items():
        if _option(model, options, name) is not None:
            raise InvalidRequest(f"{name} cannot be served behind a prefix: {reason}")
    cache = _option(model, options, "cache_implementation")
    if cache not in (None, "dynamic", "static", "hybrid"):  # transformers itself treats "hybrid" as none
        raise InvalidRequest(f"a prefix needs a dynamic or a static cache, not cache_implementation={cache!r}")


def _max_cache_len(model: Model, pairs: Pairs, ids: Tensor, options: Options) -> int | None:
    """Returns the number of tokens that a static cache needs room for; None if none was asked for."""
    if _option(model, options, "cache_implementation") != "static":
        return None
    start = options.get("decoder_input_ids") if model.config.is_encoder_decoder else ids
    needed = pairs[0][0].shape[2] + _end(model, 1 if start is None else start.shape[1], options)
    return max(needed, _option(model, options, "max_cache_len") or 0)


def _end(model: Model, width: int, options: Options) -> int:
    """Returns the tokens of a row at the end, `width` of which are the caller's own."""
    new, limit = (_option(model, options, name) for name in ("max_new_tokens", "max_length"))
    end: int = width + new if new is not None else limit or width + _DEFAULT_NEW_TOKENS
    return end


def _input_mask(model: Model, ids: Tensor, mask: Tensor | None, options: Options) -> Tensor:
    """Returns the input's mask, int64 `[B, S]`: the caller's, or the one that transformers derives from the padding."""
    if mask is None:
        pad, eos = (_option(model, options, name) for name in ("pad_token_id", "eos_token_id"))
        untold = pad is None or pad in (eos if isinstance(eos, list | tuple) else [eos])
        return torch.ones_like(ids) if untold else ids.ne(pad).to(torch.int64)
    if mask.shape != ids.shape:
        raise InvalidRequest(f"attention_mask must be {list(ids.shape)} as input_ids, got {list(mask.shape)}")
    return mask.to(ids)


def _generate_encoder_decoder(model: Model, prefix: _Prefix, ids: Tensor, options: Options) -> Any:
    """Generates with an encoder-decoder model: the decoder starts where its cache ends.

    The encoder's mask is unchanged.
    """
    mask, start = options.get("decoder_attention_mask"), options.get("decoder_input_ids")
    if not prefix.mask.all():
        if not hasattr(model.config, "relative_attention_num_buckets"):
            raise InvalidRequest("rows with prefixes of several lengths need a decoder with relative positions, as T5")
        mask = prefix.mask.new_ones(ids.shape[0], 1 if start is None else start.shape[1]) if mask is None else mask
    if mask is not None:
        options["decoder_attention_mask"] = prefix.extend(mask).to(ids.device)
    cache: Any = prefix.cache(model, options)
    if prefix.max_cache_len is not None:
        cross = StaticCache(config=model.config, max_cache_len=ids.shape[1])
        cache = EncoderDecoderCache(cache.self_attention_cache, cross)
    return _from_cache(model, cache, ids, options)


def _from_cache(model: Model, cache: Cache, ids: Tensor, options: Options) -> Any:
    """Returns the result of `model.generate`, which must continue from `cache`."""
    check = ContinuationCheck(model, cache)
    if not _option(model, options, "prompt_lookup_num_tokens"):  # lookup asks processors before the first forward
        options = options | {"logits_processor": [check, *(options.get("logits_processor") or ())]}
    output = model.generate(ids, past_key_values=cache, **options)
    check.require()  # a model's own `generate` may drop the processors too
    return output


def _generate_decoder(model: Model, prefix: _Prefix, ids: Tensor, mask: Tensor, options: Options) -> Any:
    if len(empty := (mask == 0).all(dim=1).nonzero()):
        raise InvalidRequest(f"row {int(empty[0])} of input_ids has no token: its attention_mask is all zeros")
    even = bool(prefix.mask.all())
    if not even and prefix.skips_layers(model):
        raise InvalidRequest("rows with prefixes of several lengths need a model that takes the prefix in all layers")
    if not even and not follows_mask(model):
        raise InvalidRequest("rows with prefixes of several lengths need a model that takes position_ids")
    if bool((mask[:, 1:] >= mask[:, :-1]).all()):
        # Float, as PEFT's. Falcon's ALiBi is more exact then: it rounds integers to bfloat16, as for a row without
        # padding.
        return _continue(model, prefix, ids, mask.to(torch.float32) if even else mask, options)
    if prefix.skips_layers(model) or padding_shows(model, prefix.mask.shape[1] + _end(model, ids.shape[1], options)):
        return _generate_by_length(model, prefix, ids, mask, options)
    order = mask.argsort(dim=1, stable=True)  # (B, S): padding first, then the tokens in their order
    options = options | moved(options, order)
    output = _continue(model, prefix, ids.gather(1, order), mask.gather(1, order), options)
    sequences = output if isinstance(output, Tensor) else output.sequences
    behind = _behind(ids, sequences[:, ids.shape[1] :], model, options)
    if isinstance(output, Tensor):
        return behind
    output.sequences = behind
    return output


def _continue(model: Model, prefix: _Prefix, ids: Tensor, mask: Tensor, options: Options) -> Any:
    """Returns the result of `model.generate` for rows padded on the left, whose tokens have the positions N and up.

    transformers asks the model for the positions of its inputs, which have several dimensions if there are images.
    Behind a filled cache it would not ask, so it is done here: the positions without a prefix, plus N, as in PEFT.
    """
    if "position_ids" in signature(model.forward).parameters:
        own = options.get("position_ids")
        if own is None:
            own = model._prepare_position_ids_for_generation(ids, {**options, "attention_mask": mask})
        # (B, 1) -> broadcast over (B, S), or (3 or 4, B, S)
        options = options | {"position_ids": own + prefix.mask.to(own).sum(dim=1, keepdim=True)}
    cache = prefix.cache(model, options)
    return _from_cache(model, cache, ids, options | {"attention_mask": prefix.extend(mask)})


def _behind(ids: Tensor, new: Tensor, model: Model, options: Options) -> Tensor:
    """Returns the new tokens behind the caller's own ids."""
    repeats = _option(model, options, "num_return_sequences") or 1
    return torch.cat([ids.repeat_interleave(repeats, dim=0), new.to(ids)], dim=1)


def _generate_by_length(model: Model, prefix: _Prefix, ids: Tensor, mask: Tensor, options: Options) -> Tensor:
    """Generates the rows of one length at a time, without any padding."""
    lengths = _lengths(model, mask, options)
    parts = []
    for length in sorted(set(lengths.tolist())):
        rows = (lengths == length).nonzero().flatten()
        own = ids[rows][mask[rows] == 1].view(-1, length)
        limits = _shortened(model, options, ids.shape[1] - length)
        parts.append(
            (rows, _continue(model, prefix.select(rows), own, torch.ones_like(own), options | limits)[:, length:])
        )
    repeats = _option(model, options, "num_return_sequences") or 1
    pad, eos = (_option(model, options, name) for name in ("pad_token_id", "eos_token_id"))
    fill = pad if pad is not None else (eos[0] if isinstance(eos, list | tuple) else eos) or 0
    new = ids.new_full((len(ids), repeats, max(part.shape[1] for _, part in parts)), fill)
    for rows, part in parts:
        new[rows, :, : part.shape[1]] = part.view(len(rows), repeats, -1).to(ids)
    return _behind(ids, new.flatten(0, 1), model, options)


def _lengths(model: Model, mask: Tensor, options: Options) -> Tensor:
    """Returns the tokens of each row, `[B]`.

    Raises:
        InvalidRequest: an option could have an entry per row, or depend on the number of rows.
    """
    apart = {*GenerationConfig().to_dict(), "generation_config", "tokenizer", "synced_gpus"}  # type: ignore[no-untyped-call]
    per_row = [name for name, value in options.items() if name not in apart and value is not None]
    if _option(model, options, "return_dict_in_generate"):
        per_row.append("return_dict_in_generate")
    if per_row:
        what = ", ".join(per_row)
        raise InvalidRequest(f"{what} cannot be served with right padding in a model of this kind; pad on the left")
    return mask.sum(dim=1)


def _shortened(model: Model, options: Options, padding: int) -> Options:
    """Returns `min_length` and `max_length` without the padding, which they count, for rows without padding."""
    limits = {}
    for kind in ("min", "max"):
        limit = _option(model, options, f"{kind}_length")
        if limit and _option(model, options, f"{kind}_new_tokens") is None:
            limits[f"{kind}_length"] = max(limit - padding, 0)
    return limits
