"""A prefix in transformers gives PEFT's keys, values, logits and greedy tokens, for every architecture."""

from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, Gemma3Config, T5Config

from prefix_service.client.transformers.caches import to_cache
from prefix_service.client.transformers.generation import generate
from prefix_service.errors import DimensionMismatch, InvalidRequest
from prefix_service.prefix.kv import extend_mask, position_ids
from tests.architectures import (
    DECODERS,
    ENCODER_DECODERS,
    ENCODERS,
    LEFT,
    LENGTHS,
    NAMED,
    NUM_VIRTUAL_TOKENS,
    RIGHT,
    ROWS,
    TOKENS,
    base,
    padded,
)
from tests.client.conftest import Pairs, Peft

pytestmark = [
    # This is transformers' warning, for a property that PEFT reads.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # This is PEFT's warning, for an adapter without a base model's name, and for Gemma 4's layers without a prefix.
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
    pytest.mark.filterwarnings("ignore:Prefix tuning injected into layers:UserWarning"),
    # This is transformers' warning, for a call that leaves the number of new tokens to it.
    pytest.mark.filterwarnings("ignore:Using the model-agnostic default:UserWarning"),
]

NEW: dict[str, Any] = {"max_new_tokens": 8}

decoders = pytest.mark.parametrize("name", [architecture.name for architecture in DECODERS])
encoder_decoders = pytest.mark.parametrize("name", [architecture.name for architecture in ENCODER_DECODERS])
encoders = pytest.mark.parametrize("name", [architecture.name for architecture in ENCODERS])
generating = pytest.mark.parametrize("name", [name for name in NAMED if NAMED[name] not in ENCODERS])
masks = pytest.mark.parametrize("mask", [RIGHT, LEFT], ids=["right", "left"])


# --- to_cache ---


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("name", NAMED)
def test_the_cache_is_pefts_bit_for_bit(name: str, batch_size: int, pairs: Pairs, peft_model: Peft) -> None:
    expected = peft_model(name).get_prompt(batch_size)
    found = to_cache(pairs(name, batch_size), base(name).config)
    assert type(found) is type(expected)
    assert found.get_seq_length() == expected.get_seq_length()
    if isinstance(expected, EncoderDecoderCache):
        assert isinstance(found, EncoderDecoderCache)
        assert not any(found.is_updated.values())
        assert found.cross_attention_cache.get_seq_length() == 0
        expected, found = expected.self_attention_cache, found.self_attention_cache
    for want, have in zip_longest(expected.layers, found.layers):
        for kind in ("keys", "values"):
            assert (getattr(want, kind, None) is None) == (getattr(have, kind, None) is None)
            if getattr(want, kind, None) is not None:
                torch.testing.assert_close(getattr(have, kind), getattr(want, kind), rtol=0, atol=0)


def test_sliding_layers_keep_their_window_and_count_all_virtual_tokens(pairs: Pairs) -> None:
    layers: list[Any] = to_cache(pairs("gemma3-short-window"), base("gemma3-short-window").config).layers
    assert [layer.keys.shape[2] for layer in layers] == [3, NUM_VIRTUAL_TOKENS] * 2
    assert {layer.get_seq_length() for layer in layers} == {NUM_VIRTUAL_TOKENS}


def test_gemma4_slices_sliding_layers_and_leaves_wider_and_sharing_layers_out(pairs: Pairs) -> None:
    def shapes(name: str) -> list[tuple[int, int] | None]:
        layers = to_cache(pairs(name), base(name).config).layers
        keys = [getattr(layer, "keys", None) for layer in layers]
        return [None if key is None else (key.shape[1], key.shape[3]) for key in keys]

    assert shapes("gemma4") == [(2, 16), (2, 32)] * 2
    assert shapes("gemma4-shared-layers") == [(2, 16), (2, 32), None, None]
    assert shapes("gemma4-wider-sliding-layers") == [None, (1, 32)] * 2


def test_a_vision_language_config_is_read_at_its_text_config(pairs: Pairs) -> None:
    config = Gemma3Config(text_config=base("gemma3-short-window").config.to_dict())
    assert to_cache(pairs("gemma3-short-window"), config).is_sliding == [True, False] * 2


@pytest.mark.parametrize("name", ["gpt2", "gemma3-short-window", "t5"])
def test_the_given_tensors_are_never_written_to(name: str, pairs: Pairs) -> None:
    given = pairs(name, 3)
    before = [(key.clone(), value.clone()) for key, value in given]
    cache = to_cache(given, base(name).config)
    layers: list[Any] = getattr(cache, "self_attention_cache", cache).layers
    for layer in layers:
        layer.keys.fill_(7)
        layer.values.fill_(7)
    generate(base(name), given, padded(LEFT), LEFT, num_beams=2, **NEW)
    for (key, value), (key_before, value_before) in zip(given, before, strict=True):
        assert torch.equal(key, key_before)
        assert torch.equal(value, value_before)


@pytest.mark.parametrize(
    ("given", "config_of", "message"),
    [
        ((2, 4, 8), "gpt2", "the prefix has 2 layers, the model has 3"),
        ((4, 4, 8), "gpt2", "the prefix has 4 layers, the model has 3"),
        ((3, 4, 8), "llama", "4 key/value heads of size 8, layer 0 of the model has 2 of size 8"),
        ((3, 2, 8), "qwen3", "2 key/value heads of size 8, layer 0 of the model has 2 of size 16"),
        ((3, 4, 8), "gpt-bigcode", "4 key/value heads of size 8, layer 0 of the model has 1 of size 8"),
        ((3, 4, 8), "falcon-multi-query", "4 key/value heads of size 8, layer 0 of the model has 1 of size 8"),
        ((3, 2, 8), "falcon-grouped", "2 key/value heads of size 8, layer 0 of the model has 4 of size 8"),
        ((4, 4, 16), "gemma2", "4 key/value heads of size 16, layer 0 of the model has 2 of size 16"),
        ((4, 1, 8), "gemma4", "1 key/value heads of size 8, layer 0 of the model has 2 of size 16"),
        ((3, 4, 8), "t5", "the prefix has 3 layers, the model has 4"),
        ((3, 2, 16), "bart", "2 key/value heads of size 16, layer 0 of the model has 4 of size 8"),
        ((3, 2, 16), "bert-token", "2 key/value heads of size 16, layer 0 of the model has 4 of size 8"),
    ],
)
def test_dimensions_that_do_not_fit_are_named(given: tuple[int, int, int], config_of: str, message: str) -> None:
    layers, heads, dim = given
    tensor = torch.zeros(1, heads, NUM_VIRTUAL_TOKENS, dim)
    with pytest.raises(DimensionMismatch, match=message):
        to_cache([(tensor, tensor)] * layers, base(config_of).config)


def test_a_decoder_deeper_than_the_adapter_cannot_be_filled(pairs: Pairs) -> None:
    config = T5Config(num_layers=4, num_decoder_layers=5, d_model=32, d_kv=8, num_heads=4)
    with pytest.raises(DimensionMismatch, match="the prefix has 4 layers, the model has 5"):
        to_cache(pairs("t5"), config)


# --- Logits of the bare base model ---


@masks
@decoders
def test_decoder_logits_equal_pefts(name: str, mask: Tensor, pairs: Pairs, peft_model: Peft) -> None:
    own, ours = {}, {}
    if NAMED[name].accepts_position_ids:
        own, ours = ({"position_ids": position_ids(mask, tokens)} for tokens in (0, NAMED[name].num_virtual_tokens))
    inputs = {"input_ids": padded(mask)}
    expected = peft_model(name)(**inputs, attention_mask=mask, **own).logits
    whole = extend_mask(mask, NAMED[name].num_virtual_tokens, dtype=torch.float32)
    prefix = to_cache(pairs(name, len(mask)), base(name).config)
    found = base(name)(**inputs, attention_mask=whole, past_key_values=prefix, **ours).logits
    torch.testing.assert_close(found[mask == 1], expected[mask == 1], rtol=0, atol=5e-5)


@masks
@encoder_decoders
def test_encoder_decoder_logits_equal_pefts(name: str, mask: Tensor, pairs: Pairs, peft_model: Peft) -> None:
    decoder_mask = mask[:, 1:5] if mask is RIGHT else mask[:, -4:]
    inputs = {"input_ids": padded(mask), "attention_mask": mask, "decoder_input_ids": TOKENS[:, :4]}
    expected = peft_model(name)(**inputs, decoder_attention_mask=decoder_mask).logits
    whole = extend_mask(decoder_mask, NUM_VIRTUAL_TOKENS)
    prefix = to_cache(pairs(name, len(mask)), base(name).config)
    found = base(name)(**inputs, decoder_attention_mask=whole, past_key_values=prefix).logits
    torch.testing.assert_close(found[decoder_mask == 1], expected[decoder_mask == 1], rtol=0, atol=5e-5)


@masks
@encoders
def test_encoder_logits_equal_pefts(name: str, mask: Tensor, pairs: Pairs, peft_model: Peft) -> None:
    expected = peft_model(name)(input_ids=padded(mask), attention_mask=mask).logits
    prefix = to_cache(pairs(name, len(mask)), base(name).config)
    whole = extend_mask(mask, NUM_VIRTUAL_TOKENS)
    found = base(name)(input_ids=padded(mask), attention_mask=whole, past_key_values=prefix).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-5)
    assert (base(name)(input_ids=padded(mask), attention_mask=mask).logits - expected).abs().max() > 0.1


# --- generate ---


@generating
def test_left_padded_rows_generate_what_peft_generates(name: str, pairs: Pairs, peft_model: Peft) -> None:
    inputs = {"input_ids": padded(LEFT), "attention_mask": LEFT, **NEW}
    as_object = inputs | {"return_dict_in_generate": True, "output_logits": True}
    expected = peft_model(name).generate(**as_object)
    found = generate(base(name), pairs(name), **as_object)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=5e-5)
    assert torch.equal(generate(base(name), pairs(name), **inputs), expected.sequences)
    assert not torch.equal(base(name).generate(**inputs), expected.sequences), "the prefix must matter"


@generating
def test_right_padded_rows_generate_what_each_row_does_alone(name: str, pairs: Pairs, peft_model: Peft) -> None:
    found = generate(base(name), pairs(name), padded(RIGHT), RIGHT, **NEW)
    alone = [peft_model(name).generate(input_ids=tokens, **NEW)[0] for tokens in ROWS]
    if base(name).config.is_encoder_decoder:
        assert torch.equal(found, torch.stack(alone))
        return
    assert torch.equal(found[:, : RIGHT.shape[1]], padded(RIGHT)), "the caller's ids come back as they were"
    for row, (whole, length) in enumerate(zip(alone, LENGTHS, strict=True)):
        assert torch.equal(found[row, RIGHT.shape[1] :], whole[length:])


OPTIONS: list[dict[str, Any]] = [
    {"num_beams": 3},
    {"num_beams": 3, "num_return_sequences": 2},
    {"do_sample": True, "num_return_sequences": 2},
    {"repetition_penalty": 3.0, "no_repeat_ngram_size": 2},
    {"max_new_tokens": None, "max_length": 12},
    {"max_new_tokens": None},
    {"eos_token_id": list(range(20, 40)), "min_new_tokens": 2},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", ["gpt2", "gemma3-short-window", "t5"])
def test_generation_options_do_what_they_do_in_peft(
    name: str, options: dict[str, Any], pairs: Pairs, peft_model: Peft
) -> None:
    inputs = {"input_ids": padded(LEFT), "attention_mask": LEFT, **NEW, **options}
    theirs, model, own = peft_model(name), base(name), pairs(name)  # made first: a model's beginnings are drawn too
    torch.manual_seed(2)
    expected = theirs.generate(**inputs)
    torch.manual_seed(2)
    assert torch.equal(generate(model, own, **inputs), expected)


@pytest.mark.parametrize("options", [OPTIONS[1], OPTIONS[4], OPTIONS[6]], ids=str)
@pytest.mark.parametrize("name", ["gpt2", "gemma3-short-window", "gemma4-wider-sliding-layers"])
def test_options_hold_for_right_padded_rows_too(name: str, options: dict[str, Any], pairs: Pairs) -> None:
    options = NEW | options
    found = generate(base(name), pairs(name), padded(RIGHT), RIGHT, **options)
    given, found = found.view(len(LENGTHS), -1, found.shape[1]).split(
        [RIGHT.shape[1], found.shape[1] - RIGHT.shape[1]], 2
    )
    assert torch.equal(given, padded(RIGHT)[:, None].expand_as(given))
    for row, (tokens, length) in enumerate(zip(ROWS, LENGTHS, strict=True)):
        limit = {"max_length": length + 12 - RIGHT.shape[1]} if "max_length" in options else {}
        alone = generate(base(name), pairs(name), tokens, **options | limit)[:, length:]
        assert torch.equal(found[row, :, : alone.shape[1]], alone)
        assert not found[row, :, alone.shape[1] :].any(), "a finished row goes on with pad ids"


@pytest.mark.parametrize("name", ["gpt2", "falcon-alibi-16-heads", "t5"])
def test_an_output_object_holds_the_callers_ids_and_each_rows_own_logits(name: str, pairs: Pairs) -> None:
    options = NEW | {"return_dict_in_generate": True, "output_logits": True}
    output = generate(base(name), pairs(name), padded(RIGHT), RIGHT, **options)
    assert torch.equal(output.sequences, generate(base(name), pairs(name), padded(RIGHT), RIGHT, **NEW))
    for row, tokens in enumerate(ROWS):
        alone = generate(base(name), pairs(name), tokens, **options)
        for step, logits in enumerate(output.logits):
            torch.testing.assert_close(logits[row], alone.logits[step][0], rtol=0, atol=5e-5)


def test_a_model_that_is_set_not_to_use_a_cache_uses_the_prefix(pairs: Pairs) -> None:
    expected = generate(base("llama"), pairs("llama"), TOKENS, **NEW)
    assert torch.equal(generate(base("llama"), pairs("llama"), TOKENS, use_cache=False, **NEW), expected)


def test_prompt_lookup_decoding_finds_the_same_tokens(pairs: Pairs) -> None:
    prompt = ROWS[0].repeat(1, 2)
    expected = generate(base("gpt2"), pairs("gpt2"), prompt, **NEW)
    assert torch.equal(generate(base("gpt2"), pairs("gpt2"), prompt, prompt_lookup_num_tokens=3, **NEW), expected)


def test_given_positions_count_from_behind_the_prefix_as_in_peft(pairs: Pairs, peft_model: Peft) -> None:
    inputs = {"input_ids": padded(LEFT), "attention_mask": LEFT, "position_ids": position_ids(LEFT, 3), **NEW}
    expected = peft_model("gpt2").generate(**inputs)
    assert torch.equal(generate(base("gpt2"), pairs("gpt2"), **inputs), expected)
    moved = {"input_ids": padded(RIGHT), "attention_mask": RIGHT, "position_ids": position_ids(RIGHT, 3), **NEW}
    assert torch.equal(generate(base("gpt2"), pairs("gpt2"), **moved)[:, 7:], expected[:, 7:])


def test_the_prefix_takes_the_models_dtype(adapter_dir: Callable[[str], Path], pairs: Pairs) -> None:
    half = NAMED["llama"].build().to(torch.bfloat16)
    assert generate(half, pairs("llama"), TOKENS, **NEW).shape == (3, 15)


@masks
def test_without_a_mask_pad_ids_are_padding(mask: Tensor, pairs: Pairs) -> None:
    ids = padded(mask)
    expected = generate(base("gpt2"), pairs("gpt2"), ids, mask, **NEW)
    assert torch.equal(generate(base("gpt2"), pairs("gpt2"), inputs=ids, **NEW), expected)


def test_without_a_mask_a_pad_id_that_also_ends_a_row_is_a_token(pairs: Pairs) -> None:
    options = NEW | {"pad_token_id": 0, "eos_token_id": [0, 1]}
    expected = generate(base("gpt2"), pairs("gpt2"), padded(LEFT), torch.ones_like(LEFT), **options)
    assert torch.equal(generate(base("gpt2"), pairs("gpt2"), padded(LEFT), **options), expected)


OWN_PREFIXES = [
    (name, mask) for name in ("llama", "bloom", "opt", "falcon-alibi-16-heads", "t5") for mask in (LEFT, RIGHT)
]


@pytest.mark.parametrize(("name", "mask"), [*OWN_PREFIXES, ("gemma3-short-window", RIGHT)])
def test_each_row_has_its_own_prefix_of_its_own_length(name: str, mask: Tensor, pairs: Pairs) -> None:
    full, short = pairs(name), [(key[:, :, -2:], value[:, :, -2:]) for key, value in pairs(name)]
    lengths = torch.tensor([NUM_VIRTUAL_TOKENS, 2, NUM_VIRTUAL_TOKENS])[:, None]
    prefix_mask = (torch.arange(NUM_VIRTUAL_TOKENS) >= NUM_VIRTUAL_TOKENS - lengths).to(torch.int64)
    visible = prefix_mask[:, None, :, None]
    mixed = [(key * visible, value * visible) for key, value in full]
    options = NEW | {"num_beams": 2}
    found = generate(base(name), mixed, padded(mask), mask, prefix_mask=prefix_mask, **options)
    for row, (own, tokens) in enumerate(zip((full, short, full), ROWS, strict=True)):
        assert torch.equal(found[row, -8:], generate(base(name), own, tokens, **options)[0, -8:])


def test_rows_with_their_own_prefixes_have_the_logits_of_each_row_alone(pairs: Pairs) -> None:
    model, given = base("falcon-alibi-16-heads"), pairs("falcon-alibi-16-heads", 2)
    prefix_mask = torch.tensor([[1] * NUM_VIRTUAL_TOKENS, [0] * NUM_VIRTUAL_TOKENS])
    options = NEW | {"return_dict_in_generate": True, "output_logits": True}
    output = generate(model, given, TOKENS[:2], prefix_mask=prefix_mask, **options)
    with_prefix = generate(model, pairs("falcon-alibi-16-heads"), TOKENS[:1], **options)
    for step, without in enumerate(model.generate(TOKENS[1:2], **options).logits):
        torch.testing.assert_close(output.logits[step][0], with_prefix.logits[step][0], rtol=0, atol=5e-5)
        torch.testing.assert_close(output.logits[step][1], without[0], rtol=0, atol=5e-5)


# --- Refusals of generate ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"past_key_values": DynamicCache()}, "past_key_values cannot be served behind a prefix: the prefix fills"),
        ({"assistant_model": object()}, "assistant_model cannot be served"),
        ({"inputs_embeds": torch.zeros(3, 7, 32)}, "inputs_embeds cannot be served"),
        ({"prefill_chunk_size": 2}, "prefill_chunk_size cannot be served"),
        ({"cache_implementation": "quantized"}, "dynamic or a static cache, not cache_implementation=.quantized."),
        ({"input_ids": None}, "needs input_ids"),
        ({"attention_mask": torch.ones(3, 13)}, r"attention_mask must be \[3, 7\] as input_ids, got \[3, 13\]"),
        ({"prefix_mask": torch.ones(3, 7)}, r"prefix_mask must be \[3, 6\], got \[3, 7\]"),
        ({"input_ids": TOKENS[:2]}, "the prefix has 3 rows, input_ids has 2"),
    ],
)
def test_what_a_prefix_cannot_serve_is_refused(options: dict[str, Any], message: str, pairs: Pairs) -> None:
    with pytest.raises(InvalidRequest, match=message):
        generate(base("gpt2"), pairs("gpt2", 3), **{"input_ids": TOKENS, **NEW, **options})


@pytest.mark.parametrize(
    ("mask", "options", "message"),
    [
        (RIGHT, {"return_dict_in_generate": True}, "return_dict_in_generate cannot be served with right padding"),
        (RIGHT, {"position_ids": position_ids(RIGHT, 0)}, "position_ids cannot be served with right padding"),
        (RIGHT, {"prefix_allowed_tokens_fn": lambda _row, _ids: [5]}, "prefix_allowed_tokens_fn cannot be served"),
    ],
)
def test_what_cannot_be_generated_length_by_length_is_refused(
    mask: Tensor, options: dict[str, Any], message: str, pairs: Pairs
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        generate(base("gemma3-short-window"), pairs("gemma3-short-window"), TOKENS, mask, **NEW, **options)


@pytest.mark.parametrize(
    ("name", "message"),
    [("bart", "a decoder with relative positions"), ("gemma4-wider-sliding-layers", "the prefix in all layers")],
)
def test_prefixes_of_several_lengths_are_refused_where_a_model_cannot_tell(
    name: str, message: str, pairs: Pairs
) -> None:
    prefix_mask = torch.ones(3, NUM_VIRTUAL_TOKENS).tril(NUM_VIRTUAL_TOKENS - 3).flip(1)
    with pytest.raises(InvalidRequest, match=message):
        generate(base(name), pairs(name, 3), TOKENS, prefix_mask=prefix_mask, **NEW)
