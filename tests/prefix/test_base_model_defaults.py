"""`prefix.base_model_defaults`: what transformers fills in where a config.json leaves it out."""

import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from prefix_service.errors import InvalidConfig
from prefix_service.prefix.base_model import infer_dimensions
from prefix_service.prefix.config import parse_config
from tests.prefix.base_model_defaults import FILE, as_json, by_peft, make_table, model_types

# PEFT sizes a prefix for these, but by rules that the table cannot express: attention with latent keys (their head size
# is computed from sizes that nothing else has), layers that are counted from a pattern, or a language model whose
# defaults depend on the model around it. Their own numbers in config.json are read; none is filled in.
NOT_IN_THE_TABLE = {
    "axk2",
    "bailing_hybrid",
    "bridgetower",
    "clap",
    "deepseek_ocr2",
    "deepseek_ocr2_text",
    "deepseek_v2",
    "deepseek_v32",
    "dots3_note",
    "dots3_note_audio_encoder",
    "dots3_note_text",
    "funnel",
    "glm_moe_dsa",
    "glmasr",
    "hrm_text",
    "hy_v4",
    "jetmoe",
    "lightglue",
    "longcat_flash",
    "minicpm3",
    "mistral_large4",
    "mistral_large4_text",
    "nemotron_h",
    "neomme",
    "pe_audio",
    "pe_audio_video",
    "pe_video",
    "seamless_m4t",
    "seamless_m4t_v2",
    "unlimited_ocr",
    "unlimited_ocr_text",
    "voxtral",
    "voxtral_realtime",
}
TABLE: dict[str, dict[str, Any]] = json.loads(FILE.read_text())

# Of google/gemma-3-4b-it's own config.json: the numbers that it has, and those that it leaves to transformers.
GEMMA_3_4B: dict[str, Any] = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "boi_token_index": 255999,
    "eoi_token_index": 256000,
    "eos_token_id": [1, 106],
    "image_token_index": 262144,
    "initializer_range": 0.02,
    "mm_tokens_per_image": 256,
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "torch_dtype": "bfloat16",
    "vision_config": {"hidden_size": 1152, "num_attention_heads": 16, "num_hidden_layers": 27},
}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """transformers logs hundreds of warnings about default configs."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.filterwarnings("ignore")
def test_the_table_is_that_of_the_installed_transformers() -> None:
    """Made again, and compared with PEFT on configs with values left out at random, it is the same file; the model
    types that are not in it are those that this module names."""
    table, failed = make_table()
    assert as_json(table) == FILE.read_text(), "run `python -m tests.prefix.base_model_defaults`"
    assert failed.keys() == NOT_IN_THE_TABLE


def test_gemma_3_4b_tells_its_heads() -> None:
    """Its own config.json has no heads, neither outside nor in text_config."""
    assert "num_attention_heads" not in GEMMA_3_4B["text_config"]
    wanted = by_peft(CONFIG_MAPPING["gemma3"].from_dict(GEMMA_3_4B))
    assert infer_dimensions(GEMMA_3_4B) == wanted == {"num_layers": 34, "num_attention_heads": 4, "token_dim": 1024}


@pytest.mark.filterwarnings("ignore")
def test_every_model_type_fills_what_peft_fills() -> None:
    """From `{"model_type": …}` alone, but for types where a missing text_config means something else."""
    for model_type, config in model_types():
        if model_type not in NOT_IN_THE_TABLE and "given_text_config" not in TABLE[model_type]:
            assert infer_dimensions({"model_type": model_type}) == by_peft(config), model_type


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({"model_type": "mistral", "num_attention_heads": 16}, (32, 8, 2048)),
        ({"model_type": "smollm3", "num_key_value_heads": None}, (36, 16, 2048)),
        (
            {"model_type": "gpt2", "num_attention_heads": 16, "hidden_size": 1024, "num_hidden_layers": 24},
            (24, 16, 1024),
        ),
        (
            {"model_type": "qwen2_vl", "num_hidden_layers": 28, "hidden_size": 3584, "num_attention_heads": 28},
            (28, 8, 1024),
        ),
        ({"model_type": "llava", "text_config": {"num_hidden_layers": 40, "hidden_size": 5120}}, (40, 32, 5120)),
        ({"model_type": "llava", "text_config": {"model_type": "mistral"}}, (32, 8, 1024)),
    ],
    ids=lambda value: str(value)[:60],
)
def test_values_that_are_given_stand_beside_defaults(config: dict[str, Any], wanted: tuple[int, ...]) -> None:
    """By whichever name, in the outer config or the nested one; the rest is transformers'."""
    names = ("num_layers", "num_attention_heads", "token_dim")
    assert (
        infer_dimensions(config)
        == dict(zip(names, wanted, strict=True))
        == by_peft(
            CONFIG_MAPPING[config["model_type"]].from_dict({n: v for n, v in config.items() if n != "model_type"})
        )
    )


@pytest.mark.parametrize("model_type", [None, "of-next-year", ["llama"], {"a": 1}, 7])
def test_a_model_type_without_defaults_is_named(model_type: Any) -> None:
    """The message names the model type and what to do, and does not ask for the file again."""
    config = parse_config({"peft_type": "PREFIX_TUNING"})
    with pytest.raises(InvalidConfig, match=r"model_type.* does not give .*num_attention_heads.*adapter_config.json"):
        config.filled({"model_type": model_type, "num_hidden_layers": 2, "hidden_size": 8})
