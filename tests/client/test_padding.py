"""Padding between prefix and row: where a model counts it, rows padded on the right are generated without it."""

from functools import partial
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import DeepseekV3Config, JambaConfig, LlamaForCausalLM, Qwen3NextConfig, RwkvConfig, RwkvForCausalLM

from service.client.generation import generate
from service.client.padding import padding_shows
from service.client.transformers import to_cache
from service.errors import InvalidRequest
from tests.architectures import (
    DECODERS,
    LENGTHS,
    NUM_VIRTUAL_TOKENS,
    RIGHT,
    ROWS,
    SLOT_COUNTING,
    VOCABULARY,
    Architecture,
    base,
    padded,
)
from tests.client.conftest import Pairs, Peft

pytestmark = [
    # transformers', for a property that PEFT reads.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # PEFT's, for an adapter saved without a base model's name, and for the types of tokens that it drops.
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
    pytest.mark.filterwarnings("ignore:Token type ids are not supported:UserWarning"),
    pytest.mark.filterwarnings("ignore:Prefix tuning injected into layers:UserWarning"),
]

NEW: dict[str, Any] = {"max_new_tokens": 4}
LOGITS: dict[str, Any] = NEW | {"return_dict_in_generate": True, "output_logits": True}
slot_counting = pytest.mark.parametrize("name", [architecture.name for architecture in SLOT_COUNTING])

_IDS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
_WIDE = _IDS | {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_GPT = _IDS | {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_positions": 96}
OWN_ATTENTION = [
    Architecture("biogpt", "BioGpt:BioGptForCausalLM", _WIDE | {"max_position_embeddings": 96}),
    Architecture("bloom", "Bloom:BloomForCausalLM", _IDS | {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    Architecture("codegen", "CodeGen:CodeGenForCausalLM", _GPT),
    Architecture("falcon", "Falcon:FalconForCausalLM", _WIDE | {"alibi": True, "multi_query": False}),
    Architecture("gpt-neox-japanese", "GPTNeoXJapanese:GPTNeoXJapaneseForCausalLM", _WIDE),
    Architecture("gptj", "GPTJ:GPTJForCausalLM", _GPT),
    Architecture("stablelm", "StableLm:StableLmForCausalLM", _WIDE | {"num_key_value_heads": 4}),
    Architecture(
        "xglm", "XGLM:XGLMForCausalLM", _IDS | {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48}
    ),
]


def _drawn() -> list[tuple[Tensor, Tensor]]:
    """Keys and values of two layers with four heads of eight."""
    draw = torch.Generator().manual_seed(4)
    return [tuple(torch.randn(2, 1, 4, NUM_VIRTUAL_TOKENS, 8, generator=draw)) for _ in range(2)]


@slot_counting
def test_first_logits_of_a_right_padded_row_are_those_of_the_row_alone(
    name: str, pairs: Pairs, peft_model: Peft
) -> None:
    """And so are its tokens, as PEFT generates them from the row alone."""
    assert padding_shows(base(name), 10)
    scores: list[Tensor] = []

    def keep(_ids: Tensor, logits: Tensor) -> Tensor:
        scores.append(logits.clone())
        return logits

    found = generate(base(name), pairs(name), padded(RIGHT), RIGHT, logits_processor=[keep], **NEW)
    first = dict(zip(sorted(LENGTHS), scores[:: NEW["max_new_tokens"]], strict=True))  # rows go shortest first
    for row, tokens in enumerate(ROWS):
        alone = peft_model(name).generate(input_ids=tokens, **LOGITS)
        torch.testing.assert_close(first[LENGTHS[row]][0], alone.logits[0][0], rtol=0, atol=5e-5)
        assert torch.equal(found[row, RIGHT.shape[1] :], alone.sequences[0, LENGTHS[row] :])


@pytest.mark.parametrize("architecture", OWN_ATTENTION, ids=lambda architecture: architecture.name)
def test_models_with_an_attention_of_their_own_that_follows_the_mask(architecture: Architecture) -> None:
    """They were read and found to see all tokens of the mask: rows stay in one batch, and equal each row alone."""
    model = architecture.build()
    assert not padding_shows(model, 96)
    output = generate(model, _drawn(), padded(RIGHT), RIGHT, **LOGITS)
    for row, tokens in enumerate(ROWS):
        alone = generate(model, _drawn(), tokens, **LOGITS)
        for step, logits in enumerate(output.logits):
            torch.testing.assert_close(logits[row], alone.logits[step][0], rtol=0, atol=5e-5)


@pytest.mark.parametrize("name", [architecture.name for architecture in DECODERS])
def test_padding_shows_in_windows_alone_where_positions_follow_the_mask(name: str) -> None:
    """As long as a row is shorter than each window, it stays in one batch."""
    window = getattr(base(name).config, "sliding_window", None)
    assert padding_shows(base(name), 17) == (window is not None)
    assert not padding_shows(base(name), window or 17)


@slot_counting
def test_what_cannot_be_taken_apart_is_refused(name: str, pairs: Pairs) -> None:
    with pytest.raises(
        InvalidRequest, match=r"return_dict_in_generate cannot be served with right padding .* on the left"
    ):
        generate(base(name), pairs(name), padded(RIGHT), RIGHT, **LOGITS)


@slot_counting
def test_prefixes_of_several_lengths_need_positions_that_follow_the_mask(name: str, pairs: Pairs) -> None:
    """GPT-Neo takes position_ids; MPT and BART would count the slots in front of a shorter prefix."""
    prefix_mask = torch.ones(3, NUM_VIRTUAL_TOKENS).tril(NUM_VIRTUAL_TOKENS - 3).flip(1)
    mixed = partial(generate, base(name), pairs(name, 3), padded(RIGHT), RIGHT, prefix_mask=prefix_mask, **NEW)
    if name == "gpt-neo-local":
        assert mixed().shape == (3, RIGHT.shape[1] + 4)
        return
    with pytest.raises(InvalidRequest, match="prefixes of several lengths need a model that takes position_ids"):
        mixed()


def test_token_types_are_dropped_as_in_peft(pairs: Pairs, peft_model: Peft) -> None:
    """PEFT drops them in training too, so an adapter has never seen them."""
    inputs = {"input_ids": ROWS[0], "token_type_ids": torch.full_like(ROWS[0], 5), **LOGITS}
    expected = peft_model("gpt2").generate(**inputs)
    found = generate(base("gpt2"), pairs("gpt2"), **inputs)
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=5e-5)


# --- Architectures that no prefix fits ---


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (JambaConfig, "layer 0 of jamba is of type linear_attention, which keeps more than keys and values"),
        (Qwen3NextConfig, "layer 0 of qwen3_next is of type linear_attention, which keeps more than keys and values"),
        (DeepseekV3Config, "deepseek_v3 keeps compressed keys and values, which a prefix does not fit"),
    ],
)
def test_layers_without_keys_and_values_are_refused(config: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        to_cache(_drawn(), config())


def test_a_model_that_takes_no_cache_is_refused() -> None:
    """RWKV would ignore the prefix without a word."""
    config = RwkvConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32)
    with pytest.raises(InvalidRequest, match="RwkvForCausalLM takes no past_key_values"):
        generate(RwkvForCausalLM(config), _drawn(), ROWS[0], **NEW)
    for model in (config, RwkvForCausalLM(config)):
        with pytest.raises(InvalidRequest, match="takes no past_key_values"):
            to_cache(_drawn(), model)


def test_a_model_with_a_generate_of_its_own_is_refused() -> None:
    """BLIP-2 generates with the language model inside of it, past the prefix; PEFT's prefix is lost there too."""
    text = {"model_type": "opt", "vocab_size": VOCABULARY, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2}
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Blip2Config(
        text_config=text | {"num_attention_heads": 4, "word_embed_proj_dim": 32},
        qformer_config=small | {"encoder_hidden_size": 16, "vocab_size": VOCABULARY},
        vision_config=small | {"image_size": 8, "patch_size": 4},
    )
    model = transformers.Blip2ForConditionalGeneration(config)
    with pytest.raises(InvalidRequest, match="Blip2ForConditionalGeneration has a generate of its own"):
        generate(model, _drawn(), ROWS[0], **NEW)


def test_a_generate_that_only_wraps_transformers_own_is_served(pairs: Pairs) -> None:
    """Janus and others do so: the prefix reaches the model through `super()`."""

    class Wrapping(LlamaForCausalLM):  # type: ignore[no-untyped-call]
        @torch.no_grad()
        def generate(self, *args: Any, **options: Any) -> Any:
            return super().generate(*args, **options)  # type: ignore[misc]

    model = Wrapping(base("llama").config)
    model.load_state_dict(base("llama").state_dict())
    assert torch.equal(
        generate(model, pairs("llama"), ROWS[0], **NEW), generate(base("llama"), pairs("llama"), ROWS[0], **NEW)
    )
