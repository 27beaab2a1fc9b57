"""A prefix in transformers' static cache gives PEFT's tokens, with one compilation for all adapters and steps."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.functional import pad
from transformers import BertConfig, CompileConfig, EncoderDecoderCache, FalconConfig, GenerationConfig, StaticCache

from prefix_service.client.transformers.caches import to_cache
from prefix_service.client.transformers.generation import generate
from prefix_service.errors import DimensionMismatch, InvalidRequest
from prefix_service.prefix.kv import extend_mask, position_ids
from tests.architectures import (
    ENCODERS,
    LEFT,
    NAMED,
    NUM_VIRTUAL_TOKENS,
    RIGHT,
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
STATIC: dict[str, Any] = {"cache_implementation": "static"}
ALIBI = "falcon-alibi-16-heads"
WITHOUT = (ALIBI, "mpt", "gpt-neo-local")
ROOM = 40

static = pytest.mark.parametrize(
    "name", [name for name in NAMED if NAMED[name] not in ENCODERS and name not in WITHOUT]
)


@static
def test_a_static_cache_generates_what_peft_generates(name: str, pairs: Pairs, peft_model: Peft) -> None:
    """In every architecture that has one, the cache is static and the tokens are PEFT's."""
    inputs = {"input_ids": padded(LEFT), "attention_mask": LEFT, **NEW}
    found = generate(base(name), pairs(name), **inputs, **STATIC, return_dict_in_generate=True)
    assert torch.equal(found.sequences, peft_model(name).generate(**inputs))
    cache = found.past_key_values
    caches = [cache.self_attention_cache, cache.cross_attention_cache] if "t5" in name or name == "bart" else [cache]
    assert {type(each) for each in caches} == {StaticCache}


@static
def test_the_logits_behind_a_static_cache(name: str, pairs: Pairs) -> None:
    """A model has the same logits after `to_cache` with room, whatever part of it is empty."""
    model, given = base(name), pairs(name, 3)
    mask = pad(extend_mask(LEFT, NUM_VIRTUAL_TOKENS), (0, ROOM - 13))  # BLOOM's bias wants all of the cache's length
    inputs: dict[str, Any] = {"input_ids": padded(LEFT), "attention_mask": mask}
    if model.config.is_encoder_decoder:
        inputs = {"input_ids": padded(LEFT), "attention_mask": LEFT, "decoder_input_ids": TOKENS[:, :4]}
    elif NAMED[name].accepts_position_ids:
        inputs["position_ids"] = position_ids(LEFT, NUM_VIRTUAL_TOKENS)
    found = model(**inputs, past_key_values=to_cache(given, model.config, ROOM)).logits
    inputs["attention_mask"] = inputs["attention_mask"][:, :13]
    expected = model(**inputs, past_key_values=to_cache(given, model.config)).logits
    real = torch.ones_like(TOKENS[:, :4]) if model.config.is_encoder_decoder else LEFT
    torch.testing.assert_close(found[real == 1], expected[real == 1], rtol=0, atol=5e-5)


def test_what_a_static_cache_is_made_of(pairs: Pairs) -> None:
    """Full layers have room for all, sliding ones for their window; encoders and decoders have caches of their own."""
    name = "gemma3-short-window"
    layers: list[Any] = to_cache(pairs(name, 2), base(name).config, max_cache_len=ROOM).layers
    assert [layer.keys.shape[2] for layer in layers] == [4, ROOM] * 2
    assert {int(layer.get_seq_length()) for layer in layers} == {NUM_VIRTUAL_TOKENS}
    t5 = to_cache(pairs("t5"), base("t5").config, max_cache_len=ROOM)
    assert isinstance(t5, EncoderDecoderCache)
    assert isinstance(t5.self_attention_cache, StaticCache)
    assert t5.cross_attention_cache.get_seq_length() == 0


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3, "num_return_sequences": 2},
        {"max_new_tokens": None, "max_length": 12},
        {"max_new_tokens": None},
        {"max_cache_len": 3},
        {"max_cache_len": 64},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["gpt2", "gemma3-short-window", "t5"])
@pytest.mark.parametrize("mask", [LEFT, RIGHT], ids=["left", "right"])
def test_options_do_what_they_do_with_a_dynamic_cache(
    name: str, options: dict[str, Any], mask: Tensor, pairs: Pairs
) -> None:
    """Beams, bounds and padding work as usual; `max_cache_len` adds room, and never takes needed room away."""
    inputs = {"input_ids": padded(mask), "attention_mask": mask, **NEW, **options}
    dynamic = {key: value for key, value in inputs.items() if key != "max_cache_len"}
    expected = generate(base(name), pairs(name), **dynamic, cache_implementation="dynamic")
    assert torch.equal(generate(base(name), pairs(name), **inputs, **STATIC), expected)


def test_the_choice_may_stand_in_a_generation_config(pairs: Pairs) -> None:
    """The choice is accepted in the call's config or in the model's own, as by `model.generate`."""
    model = NAMED["llama"].build()
    expected = generate(model, pairs("llama"), TOKENS, **NEW)
    in_config = GenerationConfig(**NEW, **STATIC, return_dict_in_generate=True)  # type: ignore[no-untyped-call]
    model.generation_config.cache_implementation = "static"
    for options in ({"generation_config": in_config}, {**NEW, "return_dict_in_generate": True}):
        found = generate(model, pairs("llama"), TOKENS, **options)
        assert torch.equal(found.sequences, expected)
        assert isinstance(found.past_key_values, StaticCache)


# --- torch.compile ---


@pytest.fixture
def graphs() -> Iterator[Any]:
    """Returns a function that returns how many graphs Dynamo has made since its last call."""
    torch._dynamo.reset()
    counters.clear()

    def made() -> int:
        number = counters["stats"]["unique_graphs"]
        counters["stats"]["unique_graphs"] = 0
        return number

    yield made
    torch._dynamo.reset()


def _drawn(name: str, tokens: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Returns another adapter for an architecture, of `tokens` virtual tokens, one row."""
    config, draw = base(name).config, torch.Generator().manual_seed(seed)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = 2, 1, getattr(config, "num_key_value_heads", config.num_attention_heads), tokens, head_dim
    return [tuple(torch.randn(shape, generator=draw)) for _ in range(config.num_hidden_layers)]


ADAPTERS = [(6, 1), (6, 2), (9, 3), (12, 4)]  # virtual tokens, seed


@pytest.mark.parametrize(("name", "first"), [("llama", 1), ("gpt2", 1), ("gemma3-short-window", 2), ("mistral", 3)])
@torch.no_grad()
def test_one_compilation_serves_all_adapters_and_steps(name: str, first: int, graphs: Any) -> None:
    """A decoding step is one graph, for adapters of equal and of other lengths. Sliding layers keep their length as a
    number too: they need another graph once that has moved, another once they are full, and then no more.
    """
    model = base(name)
    step = torch.compile(model, backend="eager", fullgraph=True)

    def decoded(forward: Any, tokens: int, seed: int) -> Tensor:
        given = [(key.expand(3, -1, -1, -1), value.expand(3, -1, -1, -1)) for key, value in _drawn(name, tokens, seed)]
        room = None if forward is model else ROOM
        cache, width = to_cache(given, model.config, room), TOKENS.shape[1]
        mask, positions = torch.ones_like(TOKENS), position_ids(torch.ones_like(TOKENS), tokens)
        logits = model(TOKENS, attention_mask=extend_mask(mask, tokens), position_ids=positions, past_key_values=cache)
        new = [logits.logits[:, -1:].argmax(-1)]
        for position in range(tokens + width, tokens + width + 7):
            at = torch.full((3, 1), position)
            new.append(forward(new[-1], position_ids=at, past_key_values=cache).logits.argmax(-1))
        return torch.cat(new, dim=1)

    made = []
    for tokens, seed in ADAPTERS:
        assert torch.equal(decoded(step, tokens, seed), decoded(model, tokens, seed))
        made.append(graphs())
    assert made == [first, 0, 0, 0]


@pytest.mark.parametrize("mask", [torch.ones_like(LEFT), LEFT], ids=["full", "left"])
def test_generate_compiles_once_for_all_adapters(mask: Tensor, graphs: Any) -> None:
    """transformers compiles `generate` once for all adapters if `max_cache_len` fixes the size."""
    config: Any = CompileConfig(backend="eager", fullgraph=True)
    config.mode, config._compile_all_devices = None, True  # "eager" has no modes; the CPU is left out otherwise
    model = NAMED["llama"].build()
    options = NEW | STATIC | {"compile_config": config, "max_cache_len": ROOM}
    made = []
    for tokens, seed in ADAPTERS:
        inputs = {"input_ids": padded(mask) if mask is LEFT else TOKENS, "attention_mask": mask}
        found = generate(model, _drawn("llama", tokens, seed), **inputs, **options)
        assert torch.equal(found, generate(model, _drawn("llama", tokens, seed), **inputs, **NEW))
        made.append(graphs())
    assert made == [1, 0, 0, 0]


# --- Refusals ---


def test_an_architecture_without_a_static_cache_is_refused(pairs: Pairs) -> None:
    """An architecture that transformers cannot run with a static cache is refused by the prefix too."""
    with pytest.raises(InvalidRequest, match="runs bert models of this config with a dynamic cache alone"):
        to_cache(pairs("bert-token"), BertConfig(**NAMED["bert-token"].config), max_cache_len=ROOM)
    for name in WITHOUT:
        with pytest.raises(InvalidRequest, match="models of this config with a dynamic cache alone"):
            generate(base(name), pairs(name), TOKENS, **NEW, **STATIC)
    with pytest.raises((ValueError, RuntimeError)):  # when this passes, the exception may go
        base(ALIBI).generate(padded(LEFT), attention_mask=LEFT, **NEW, **STATIC)
    assert to_cache(pairs("falcon-rotary"), FalconConfig(**NAMED["falcon-rotary"].config), max_cache_len=ROOM)


@pytest.mark.parametrize("room", [0, NUM_VIRTUAL_TOKENS])
def test_a_static_cache_without_room_is_refused(room: int, pairs: Pairs) -> None:
    """A static cache must have room for the prefix and one token."""
    with pytest.raises(InvalidRequest, match=f"counts the 6 virtual tokens and all that follow, got {room}"):
        to_cache(pairs("llama"), base("llama").config, max_cache_len=room)


def test_dimensions_are_checked_as_for_a_dynamic_cache(pairs: Pairs) -> None:
    """Another model's prefix is refused before it is copied."""
    with pytest.raises(DimensionMismatch, match="4 key/value heads of size 8, layer 0 of the model has 2 of size 8"):
        to_cache(pairs("gpt2"), base("llama").config, max_cache_len=ROOM)
