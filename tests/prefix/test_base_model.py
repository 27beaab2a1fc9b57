"""`prefix.base_model` infers the dimensions that PEFT would fill from the same base model's config."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import transformers
from peft.utils import other

from prefix_service.errors import InvalidConfig
from prefix_service.prefix.base_model import infer_dimensions

SHARED_GLOBAL: dict[str, Any] = {"attention_k_eq_v": True, "num_global_key_value_heads": 2}
GEMMA4 = {"global_head_dim": 32, "head_dim": 16, "num_key_value_heads": 2, "num_hidden_layers": 4}

CONFIGS: dict[str, Any] = {
    "gpt2": transformers.GPT2Config(n_layer=3, n_head=4, n_embd=32),
    "gpt-neo": transformers.GPTNeoConfig(),
    "gpt-neox": transformers.GPTNeoXConfig(),
    "gptj": transformers.GPTJConfig(),
    "llama": transformers.LlamaConfig(),
    "llama-grouped": transformers.LlamaConfig(num_key_value_heads=8),
    "mistral": transformers.MistralConfig(),
    "qwen2-vision": transformers.Qwen2VLConfig(),
    "qwen3": transformers.Qwen3Config(head_dim=128, num_key_value_heads=8),
    "phi": transformers.PhiConfig(),
    "gemma2": transformers.Gemma2Config(),
    "gemma3": transformers.Gemma3TextConfig(),
    "gemma3-vision": transformers.Gemma3Config(),
    "gemma3n-vision": transformers.Gemma3nConfig(),
    "gemma4": transformers.Gemma4TextConfig(),
    "gemma4-vision": transformers.Gemma4Config(),
    "gemma4-global-heads": transformers.Gemma4TextConfig(**SHARED_GLOBAL),
    "llava": transformers.LlavaConfig(),
    "opt": transformers.OPTConfig(),
    "bloom": transformers.BloomConfig(),
    "falcon": transformers.FalconConfig(),
    "falcon-grouped": transformers.FalconConfig(new_decoder_architecture=True, num_kv_heads=8),
    "gpt-bigcode": transformers.GPTBigCodeConfig(multi_query=False),
    "gpt-bigcode-multi-query": transformers.GPTBigCodeConfig(multi_query=True),
    "t5": transformers.T5Config(),
    "t5-shallow-decoder": transformers.T5Config(num_decoder_layers=2),
    "bart": transformers.BartConfig(encoder_layers=5, decoder_layers=5),
    "mbart": transformers.MBartConfig(),
    "bert": transformers.BertConfig(),
    "roberta": transformers.RobertaConfig(),
}

CHATGLM = {"model_type": "chatglm", "num_layers": 28, "num_attention_heads": 32, "hidden_size": 4096}
CHATGLM2 = CHATGLM | {"multi_query_attention": True, "multi_query_group_num": 2, "kv_channels": 128}


def filled_by_peft(config: Any) -> dict[str, int]:
    prepare: Any = other._prepare_prompt_learning_config
    filled = prepare(peft.PrefixTuningConfig(num_virtual_tokens=4), config)
    return {name: getattr(filled, name) for name in ("num_layers", "num_attention_heads", "token_dim")}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_in_memory_gives_what_peft_fills(name: str) -> None:
    """`config.to_dict()` gives the layers, key/value heads and token_dim that PEFT fills."""
    assert infer_dimensions(CONFIGS[name].to_dict()) == filled_by_peft(CONFIGS[name])


@pytest.mark.parametrize("name", CONFIGS)
def test_a_saved_config_gives_what_peft_fills(name: str, tmp_path: Path) -> None:
    """A config.json that `save_pretrained` wrote gives PEFT's dimensions, although it may leave attributes out."""
    CONFIGS[name].save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert infer_dimensions(saved) == filled_by_peft(CONFIGS[name])


def test_gemma4_of_an_older_transformers() -> None:
    """Before transformers 5.15 the global layers' shape had names of its own, and PEFT still reads those."""
    before = GEMMA4 | {"num_attention_heads": 4, "hidden_size": 64, "num_global_key_value_heads": 1}
    assert infer_dimensions(before) == filled_by_peft(before)
    assert infer_dimensions(before | {"num_global_key_value_heads": None})["token_dim"] == 2 * 32


def test_gemma4s_widest_layer_decides() -> None:
    """The first layer of `per_layer_config` with the largest head size decides, as in PEFT."""
    layers: dict[str, Any] = {
        "1": {"head_dim": 32, "num_key_value_heads": 1},
        "3": {"head_dim": 32},
        "4": {"num_key_value_heads": 9},
    }
    config: dict[str, Any] = {
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_size": 64,
    }
    config |= {"head_dim": 16, "per_layer_config": layers}
    assert infer_dimensions(config) == filled_by_peft(config)


def test_chatglm_keeps_all_heads() -> None:
    """ChatGLM-6B names its layers `num_layers`, and has as many key/value heads as heads."""
    assert infer_dimensions(CHATGLM) == {"num_layers": 28, "num_attention_heads": 32, "token_dim": 4096}


def test_chatglm2_shares_heads() -> None:
    """ChatGLM2's groups are its key/value heads, of `kv_channels` each; PEFT does not know those names."""
    assert infer_dimensions(CHATGLM2) == {"num_layers": 28, "num_attention_heads": 2, "token_dim": 256}


def test_gpt_bigcode_of_an_older_transformers() -> None:
    """Without `num_key_value_heads` in its config, `multi_query` (its default) means one key/value head."""
    config = {"model_type": "gpt_bigcode", "n_layer": 3, "n_head": 4, "n_embd": 32}
    assert infer_dimensions(config) == {"num_layers": 3, "num_attention_heads": 1, "token_dim": 8}
    assert infer_dimensions(config | {"multi_query": False})["token_dim"] == 32


def test_what_is_not_told_stays_open() -> None:
    """A config without numbers raises nothing: its dimensions stay None."""
    assert infer_dimensions({}) == {"num_layers": None, "num_attention_heads": None, "token_dim": None}
    assert infer_dimensions({"n_head": 4, "text_config": None})["num_attention_heads"] == 4


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_hidden_layers": "12"}, "num_hidden_layers .* must be a positive integer, got '12'"),
        ({"n_head": True}, "n_head .* must be a positive integer, got True"),
        ({"hidden_size": 0}, "hidden_size .* must be a positive integer, got 0"),
        ({"d_model": 1 << 30}, "d_model .* must be a positive integer"),
        ({"text_config": [1]}, "text_config .* must be an object"),
        ({"num_key_value_heads": 1, "per_layer_config": [1]}, "per_layer_config .* must be an object"),
        ({"num_key_value_heads": 1, "per_layer_config": {"0": {"head_dim": -1}}}, "head_dim .* must be a positive"),
    ],
)
def test_a_number_that_is_none_is_refused(config: dict[str, Any], message: str) -> None:
    """A number in a base model's config must be a positive integer; the error names the field and the value."""
    with pytest.raises(InvalidConfig, match=message):
        infer_dimensions(config)
