"""If a model counts padding between prefix and row, rows padded on the right are generated without it."""

from functools import partial
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import DeepseekV3Config, JambaConfig, LlamaForCausalLM, Qwen3NextConfig, RwkvConfig, RwkvForCausalLM

from prefix_service.client.transformers.caches import to_cache
from prefix_service.client.transformers.generation import generate
from prefix_service.client.transformers.padding import padding_shows
from prefix_service.errors import InvalidRequest
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
    # This is transformers' warning, for a property that PEFT reads.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # This is PEFT's warning, for an adapter without a base model's name, and for the types of tokens that it drops.
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


_GROUPED = _WIDE | {"max_position_embeddings": 96, "num_key_value_heads": 4}
_LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 14}
_LONGROPE |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
_PHI3 = Architecture(
    "phi3-longrope",
    "Phi3:Phi3ForCausalLM",
    _GROUPED | {"original_max_position_embeddings": 14, "rope_parameters": _LONGROPE},
)
_PHIMOE = Architecture(
    "phimoe-longrope",
    "Phimoe:PhimoeForCausalLM",
    dict(_PHI3.config)
    | {"num_local_experts": 2, "rope_parameters": _LONGROPE | {"short_mscale": 1.0, "long_mscale": 1.0}},
)
_DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
BATCH_COUNTING = [
    _PHI3,
    Architecture(
        "llama-dynamic",
        "Llama:LlamaForCausalLM",
        _GROUPED | {"max_position_embeddings": 14, "rope_parameters": _DYNAMIC},
    ),
    Architecture(
        "llama4-scaled",
        "Llama4Text:Llama4ForCausalLM",
        _GROUPED
        | {"head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2, "no_rope_layers": [1, 0]}
        | {"attn_temperature_tuning": True, "floor_scale": 4, "attn_scale": 2.0, "attention_chunk_size": 64},
    ),
]
"""Models in which a row depends on the slots, or on the longest row of its batch, once it is long enough."""


def _drawn() -> list[tuple[Tensor, Tensor]]:
    """Returns keys and values of two layers with four heads of eight."""
    draw = torch.Generator().manual_seed(4)
    return [tuple(torch.randn(2, 1, 4, NUM_VIRTUAL_TOKENS, 8, generator=draw)) for _ in range(2)]


@slot_counting
def test_first_logits_of_a_right_padded_row_are_those_of_the_row_alone(
    name: str, pairs: Pairs, peft_model: Peft
) -> None:
    """The first logits are the row's own, and its tokens those that PEFT generates from the row alone."""
    assert padding_shows(base(name), 10)
    scores: list[Tensor] = []
    hook = base(name).register_forward_hook(lambda _model, _inputs, output: scores.append(output.logits[:, -1]))
    found = generate(base(name), pairs(name), padded(RIGHT), RIGHT, **NEW)
    hook.remove()
    first = dict(zip(sorted(LENGTHS), scores[:: NEW["max_new_tokens"]], strict=True))  # rows go shortest first
    for row, tokens in enumerate(ROWS):
        alone = peft_model(name).generate(input_ids=tokens, **LOGITS)
        torch.testing.assert_close(first[LENGTHS[row]][0], alone.logits[0][0], rtol=0, atol=5e-5)
        assert torch.equal(found[row, RIGHT.shape[1] :], alone.sequences[0, LENGTHS[row] :])


@pytest.mark.parametrize("architecture", OWN_ATTENTION, ids=lambda architecture: architecture.name)
def test_models_with_an_attention_of_their_own_that_follows_the_mask(architecture: Architecture) -> None:
    """These models see all tokens of the mask: rows stay in one batch, and equal each row alone."""
    model = architecture.build()
    assert not padding_shows(model, 96)
    output = generate(model, _drawn(), padded(RIGHT), RIGHT, **LOGITS)
    for row, tokens in enumerate(ROWS):
        alone = generate(model, _drawn(), tokens, **LOGITS)
        for step, logits in enumerate(output.logits):
            torch.testing.assert_close(logits[row], alone.logits[step][0], rtol=0, atol=5e-5)


@pytest.mark.parametrize("architecture", BATCH_COUNTING, ids=lambda architecture: architecture.name)
def test_no_longer_row_of_the_batch_changes_a_row(architecture: Architecture) -> None:
    """Rows go by length if the longest row sets frequencies (longrope, dynamic) or slots set a scale (Llama 4)."""
    options: dict[str, Any] = {"max_new_tokens": 10}
    assert padding_shows(architecture.build(), 15)
    assert not padding_shows(architecture.build(), 3)
    found = generate(architecture.build(), _drawn(), padded(RIGHT), RIGHT, **options)
    for row, tokens in enumerate(ROWS):
        alone = generate(architecture.build(), _drawn(), tokens, **options)
        assert torch.equal(found[row, RIGHT.shape[1] :], alone[0, LENGTHS[row] :])


@pytest.mark.parametrize("name", [architecture.name for architecture in DECODERS])
def test_padding_shows_in_windows_alone_where_positions_follow_the_mask(name: str) -> None:
    """A batch stays together as long as its rows are shorter than each window."""
    window = getattr(base(name).config, "sliding_window", None)
    assert padding_shows(base(name), 17) == (window is not None)
    assert not padding_shows(base(name), window or 17)


@slot_counting
def test_what_cannot_be_taken_apart_is_refused(name: str, pairs: Pairs) -> None:
    refused: Any = partial(generate, base(name), pairs(name), padded(RIGHT), RIGHT, **NEW)
    for option in ("logits_processor", "stopping_criteria"):
        with pytest.raises(InvalidRequest, match=f"{option} cannot be served with right padding"):
            refused(**{option: [lambda _ids, scores: scores]})
    with pytest.raises(
        InvalidRequest, match=r"return_dict_in_generate cannot be served with right padding .* on the left"
    ):
        generate(base(name), pairs(name), padded(RIGHT), RIGHT, **LOGITS)


@slot_counting
def test_the_shortest_length_counts_padding_no_more(name: str, pairs: Pairs, peft_model: Peft) -> None:
    """`min_length` is less by a row's padding, like `max_length`, so that the row ends where it ends alone."""
    row, width = 2, RIGHT.shape[1]
    alone = partial(peft_model(name).generate, input_ids=ROWS[row])
    end = int(alone(max_new_tokens=3)[0, LENGTHS[row] + 1])  # would end the row at its second token, or its first
    limits: dict[str, Any] = {"max_length": width + 8, "eos_token_id": end, "pad_token_id": 0}
    found = generate(base(name), pairs(name), padded(RIGHT), RIGHT, min_length=width + 3, **limits)[row, width:]
    padding = width - LENGTHS[row]
    short = {"min_length": LENGTHS[row] + 3, "max_length": width + 8 - padding}
    want = alone(**limits | short)[0, LENGTHS[row] :]
    assert found[: len(want)].tolist() == want.tolist()
    assert not found[len(want) :].any()


@pytest.mark.parametrize("mask", [[[1] * 7] * 2 + [[0] * 7], [[1] * 6 + [0]] * 2 + [[0] * 7]], ids=["even", "right"])
@pytest.mark.parametrize("name", ["llama", *[architecture.name for architecture in SLOT_COUNTING]])
def test_a_row_without_a_token_is_refused(name: str, mask: list[list[int]], pairs: Pairs) -> None:
    with pytest.raises(InvalidRequest, match="row 2 of input_ids has no token"):
        generate(base(name), pairs(name), padded(RIGHT), torch.tensor(mask), **NEW)


@slot_counting
def test_prefixes_of_several_lengths_need_positions_that_follow_the_mask(name: str, pairs: Pairs) -> None:
    """GPT-Neo takes position_ids; MPT and BART would count the slots before a shorter prefix, and are refused."""
    prefix_mask = torch.ones(3, NUM_VIRTUAL_TOKENS).tril(NUM_VIRTUAL_TOKENS - 3).flip(1)
    mixed = partial(generate, base(name), pairs(name, 3), padded(RIGHT), RIGHT, prefix_mask=prefix_mask, **NEW)
    if name == "gpt-neo-local":
        assert mixed().shape == (3, RIGHT.shape[1] + 4)
        return
    with pytest.raises(InvalidRequest, match="prefixes of several lengths need a model that takes position_ids"):
        mixed()


def test_token_types_are_dropped_as_in_peft(pairs: Pairs, peft_model: Peft) -> None:
    """Types of tokens are dropped, as PEFT does in training too, so no adapter has seen them."""
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
    """RWKV would ignore the prefix silently, and is refused."""
    config = RwkvConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32)
    with pytest.raises(InvalidRequest, match="RwkvForCausalLM takes no past_key_values"):
        generate(RwkvForCausalLM(config), _drawn(), ROWS[0], **NEW)
    for model in (config, RwkvForCausalLM(config)):
        with pytest.raises(InvalidRequest, match="takes no past_key_values"):
            to_cache(_drawn(), model)


def test_a_model_with_a_generate_of_its_own_is_refused() -> None:
    """BLIP-2, which generates with its inner model without the prefix, is refused; PEFT's prefix is lost there too."""
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


@pytest.mark.parametrize("architecture", [_PHI3, _PHIMOE], ids=lambda architecture: architecture.name)
def test_an_input_that_makes_the_model_drop_its_cache_is_refused(architecture: Architecture) -> None:
    """An input longer than a longrope model's first range, at which it forgets the prefix, is refused."""
    model = architecture.build()
    ids = torch.randint(3, VOCABULARY, (1, 15), generator=torch.Generator().manual_seed(3))
    assert generate(model, _drawn(), ids[:, 1:], **NEW).shape == (1, 18)
    with pytest.raises(InvalidRequest, match=r"did not continue from the prefix \(.* is longer than 14 tokens\)"):
        generate(model, _drawn(), ids, **NEW)


class _Super(LlamaForCausalLM):  # type: ignore[no-untyped-call]
    """A model whose `generate` calls the parent's, as in Janus and others."""

    @torch.no_grad()
    def generate(self, *args: Any, **options: Any) -> Any:
        return super().generate(*args, **options)  # type: ignore[misc]


class _ByName(LlamaForCausalLM):  # type: ignore[no-untyped-call]
    def generate(self, *args: Any, **options: Any) -> Any:
        return LlamaForCausalLM.generate(self, *args, **options)  # type: ignore[arg-type]


class _Forgetting(LlamaForCausalLM):  # type: ignore[no-untyped-call]
    def generate(self, *args: Any, **options: Any) -> Any:
        return super().generate(*args, max_new_tokens=options["max_new_tokens"])  # type: ignore[misc]


def _of(kind: Any) -> Any:
    model = kind(base("llama").config).eval()
    model.load_state_dict(base("llama").state_dict())
    return model


def _lora(**options: Any) -> Any:
    return get_peft_model(_of(LlamaForCausalLM), LoraConfig(r=2, target_modules=["q_proj"], **options)).eval()


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda: _of(_Super),
        lambda: _of(_ByName),
        lambda: torch.compile(_of(LlamaForCausalLM), backend="eager"),
        lambda: _lora(task_type="CAUSAL_LM"),
        _lora,
    ],
    ids=["super", "by-name", "compiled", "lora", "lora-without-task"],
)
def test_what_wraps_a_model_is_served(wrapped: Any, pairs: Pairs) -> None:
    """The prefix reaches the wrapped model, in `generate` and in `to_cache`."""
    model = wrapped()
    expected = generate(base("llama"), pairs("llama"), ROWS[0], **NEW)
    assert torch.equal(generate(model, pairs("llama"), ROWS[0], **NEW), expected)
    assert to_cache(pairs("llama"), model).get_seq_length() == NUM_VIRTUAL_TOKENS


def test_lora_acts_behind_a_prefix(pairs: Pairs) -> None:
    torch.manual_seed(5)
    model = _lora(init_lora_weights=False)
    first = generate(model, pairs("llama"), ROWS[0], **LOGITS).logits[0]
    bare = generate(base("llama"), pairs("llama"), ROWS[0], **LOGITS).logits[0]
    assert (first - bare).abs().max() > 1e-3


def test_adapters_that_act_in_pefts_wrapper_are_refused(pairs: Pairs, peft_model: Peft) -> None:
    for model in (peft_model("llama"), _lora(task_type="CAUSAL_LM", alora_invocation_tokens=[3])):
        with pytest.raises(InvalidRequest, match=r"adapter 'default' \(\w+\) acts in PEFT's wrapper"):
            generate(model, pairs("llama"), ROWS[0], **NEW)


def test_a_generate_that_drops_the_prefix_is_refused(pairs: Pairs) -> None:
    """A `generate` that forgets the prefix raises, instead of answering without it."""
    with pytest.raises(InvalidRequest, match=r"_Forgetting\.generate did not continue from the prefix"):
        generate(_of(_Forgetting), pairs("llama"), ROWS[0], **NEW)
