"""`prefix.config` has PEFT's fields and defaults, checks bounds, derives sizes, and parses JSON from outside."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
from peft.tuners.cartridge import model as cartridge_model

from prefix_service.errors import InvalidConfig
from prefix_service.prefix.config import CartridgeConfig, PrefixConfig, PrefixTuningConfig, parse_config
from prefix_service.prefix.json_text import MAX_CONFIG_BYTES, parse_json
from tests.conftest import CORPUS

TheirEncoder: Any = peft.PrefixEncoder
TheirCartridgeEncoder: Any = cartridge_model.CartridgeEncoder

SIZES: dict[str, Any] = {"num_layers": 3, "token_dim": 8, "num_attention_heads": 2, "num_virtual_tokens": 5}
LLAMA = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 16}


def prefix_tuning(**values: Any) -> PrefixConfig:
    return parse_config({"peft_type": "PREFIX_TUNING", **values})


def cartridge(**values: Any) -> PrefixConfig:
    return parse_config({"peft_type": "CARTRIDGE", **values})


@pytest.mark.parametrize(
    ("ours", "theirs"), [(PrefixTuningConfig(), peft.PrefixTuningConfig()), (CartridgeConfig(), peft.CartridgeConfig())]
)
def test_defaults_are_pefts(ours: PrefixConfig, theirs: Any) -> None:
    """Every field has PEFT's default but three: PEFT writes its own version, has no default number of tokens, and
    fills the submodules from the task later."""
    known = theirs.to_dict() | {"peft_version": None, "num_virtual_tokens": 20, "num_transformer_submodules": 1}
    assert ours.model_dump() == {name: known[name] for name in ours.model_dump()}


@pytest.mark.parametrize("path", sorted(CORPUS.glob("cases/*/adapter/adapter_config.json")), ids=lambda p: p.parts[-3])
def test_what_peft_wrote_is_read_and_nothing_is_lost(path: Path) -> None:
    """A config that PEFT saved is valid, and every key of it is kept as it was."""
    values = json.loads(path.read_text())
    assert parse_config(values, from_file=True).model_dump().items() >= values.items()


def test_unknown_keys_are_kept() -> None:
    """A field of a later PEFT survives; one that is named like a member of the class does not shadow it."""
    config = prefix_tuning(**SIZES, from_the_future=[1], prefix_embedding_dim=7, model_dump="x", filled=None)
    assert config.prefix_embedding_dim == 3 * 2 * 8
    assert config.model_dump().items() >= {"from_the_future": [1], "prefix_embedding_dim": 7, "model_dump": "x"}.items()


@pytest.mark.parametrize("peft_type", [None, "LORA", "prefix_tuning", 3, ["PREFIX_TUNING"]])
def test_another_peft_type_is_refused(peft_type: Any) -> None:
    """Only PREFIX_TUNING and CARTRIDGE are served; the message says what was found."""
    with pytest.raises(InvalidConfig, match="peft_type must be one of PREFIX_TUNING, CARTRIDGE, got"):
        parse_config({"peft_type": peft_type})


def test_another_kind_of_adapter_is_called_by_its_name() -> None:
    """The error names the kind of adapter if PEFT knows it, and repeats no unknown text."""
    with pytest.raises(InvalidConfig, match=r"^this is a LORA adapter, which is not hosted here: peft_type must be"):
        parse_config({"peft_type": "LORA"})
    with pytest.raises(InvalidConfig, match=r"^peft_type must be"):
        parse_config({"peft_type": "lora\u202e"})


@pytest.mark.parametrize("peft_type", ["PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "CPT"])
def test_the_error_of_a_soft_prompt_names_compile(peft_type: str) -> None:
    """What `compile` makes a prefix of is refused with that command, not as an adapter that is never served."""
    with pytest.raises(InvalidConfig, match=f"^peft_type {peft_type} is a soft prompt: .*prefix-service compile"):
        parse_config({"peft_type": peft_type})


def test_a_saved_config_says_its_number_of_tokens() -> None:
    """The default of 20 tokens is for new adapters; a config saved with trained weights must have the number."""
    assert prefix_tuning().num_virtual_tokens == 20
    with pytest.raises(InvalidConfig, match="num_virtual_tokens is missing"):
        parse_config({"peft_type": "PREFIX_TUNING"}, from_file=True)


@pytest.mark.parametrize(("task", "submodules"), [("SEQ_2_SEQ_LM", 2), ("CAUSAL_LM", 1), ("SEQ_CLS", 1), (None, 1)])
def test_submodules_follow_the_task(task: str | None, submodules: int) -> None:
    """An encoder-decoder task has two submodules unless the config says otherwise, as in PEFT."""
    assert prefix_tuning(task_type=task).num_transformer_submodules == submodules
    assert prefix_tuning(task_type=task, num_transformer_submodules=1).num_transformer_submodules == 1
    assert prefix_tuning(task_type=task).total_virtual_tokens == 20 * submodules


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_virtual_tokens": 0}, "num_virtual_tokens must be at least 1, got 0"),
        ({"num_layers": -1}, "num_layers must be at least 1, got -1"),
        ({"encoder_hidden_size": -1}, "encoder_hidden_size must be at least 0, got -1"),
        ({"encoder_hidden_size": "8"}, "encoder_hidden_size: .*integer.*, got '8'"),
        ({"num_virtual_tokens": (1 << 20) + 1}, "num_virtual_tokens must be at most 1048576"),
        ({"token_dim": 1 << 40}, "token_dim must be at most 262144"),
        ({"num_layers": "3"}, "num_layers: .*integer.*, got '3'"),
        ({"num_layers": True}, "num_layers: .*integer.*, got True"),
        ({"num_layers": 3.0}, "num_layers: .*integer.*, got 3.0"),
        ({"num_virtual_tokens": None}, "num_virtual_tokens: .*, got None"),
        ({"inference_mode": "yes"}, "inference_mode: .*boolean.*, got 'yes'"),
        ({"task_type": "POETRY"}, "task_type: .*, got 'POETRY'"),
        ({"num_transformer_submodules": 3}, "num_transformer_submodules: .*, got 3"),
        ({"base_model_name_or_path": 7}, "base_model_name_or_path: .*string.*, got 7"),
        (
            {"token_dim": 10, "num_attention_heads": 4},
            "token_dim must be a multiple of num_attention_heads, got 10 and",
        ),
        ({"task_type": "x" * 1000}, r"task_type: .*, got '.{70,76}\.\.\.$"),
    ],
)
def test_a_field_out_of_bounds_is_named(values: dict[str, Any], message: str) -> None:
    """The error names the field, the rule and the shortened value."""
    with pytest.raises(InvalidConfig, match=message):
        prefix_tuning(**values)


def test_a_projection_that_was_applied_needs_no_size() -> None:
    """In inference mode `prefix_projection` needs no hidden size, because training has applied the projection."""
    config = prefix_tuning(prefix_projection=True, inference_mode=True, **SIZES)
    assert isinstance(config, PrefixTuningConfig)
    assert config.trainable_parameters == 5 * 3 * 2 * 8


def test_frozen_tokens_are_among_the_virtual_tokens() -> None:
    """A cartridge can freeze all of its rows, but not more than it has."""
    assert cartridge(num_virtual_tokens=4, num_frozen_tokens=4, num_layers=1, token_dim=2).trainable_parameters == 0
    with pytest.raises(InvalidConfig, match="num_frozen_tokens must be at most num_virtual_tokens, got 5 and 4"):
        cartridge(num_virtual_tokens=4, num_frozen_tokens=5)


@pytest.mark.parametrize("projection", [False, True])
def test_trainable_parameters_of_prefix_tuning(projection: bool) -> None:
    """The formula counts what PEFT's encoder would train."""
    options = {**SIZES, "prefix_projection": projection, "encoder_hidden_size": 6}
    theirs = TheirEncoder(peft.PrefixTuningConfig(**options))
    ours = prefix_tuning(**options)
    assert ours.trainable_parameters == sum(parameter.numel() for parameter in theirs.parameters())


def test_trainable_parameters_of_a_cartridge() -> None:
    """`trainable_parameters` leaves out a cartridge's frozen rows."""
    theirs = TheirCartridgeEncoder(peft.CartridgeConfig(**SIZES, num_frozen_tokens=2))
    wanted = sum(parameter.numel() for parameter in theirs.parameters() if parameter.requires_grad)
    assert cartridge(**SIZES, num_frozen_tokens=2).trainable_parameters == wanted


def test_derived_sizes_are_unknown_until_the_dimensions_are() -> None:
    """Derived sizes are None while a dimension is unknown, and `require_dimensions` names the missing ones."""
    config = prefix_tuning(num_layers=3)
    assert config.prefix_embedding_dim is config.head_dim is config.trainable_parameters is None
    assert cartridge().trainable_parameters is None
    with pytest.raises(InvalidConfig, match=r"^token_dim, num_attention_heads missing"):
        config.require_dimensions()
    prefix_tuning(**SIZES).require_dimensions()


def test_the_base_model_fills_what_is_missing() -> None:
    """`filled` takes the missing dimensions from Llama's config (two key/value heads of size 4) alone."""
    config = prefix_tuning(revision="main", extra=1).filled(LLAMA)
    assert (config.num_layers, config.num_attention_heads, config.token_dim, config.head_dim) == (3, 2, 8, 4)
    assert config.model_dump().items() >= {"revision": "main", "extra": 1}.items()


def test_the_adapters_own_dimensions_stand() -> None:
    """PEFT wrote final values into the adapter's config, so the base model does not overrule them."""
    config = prefix_tuning(num_layers=7, token_dim=32, num_attention_heads=4)
    assert config.filled(LLAMA) == config


def test_a_base_model_that_tells_nothing_is_named() -> None:
    """The error names the model type and the missing dimensions instead of asking for the file that was given."""
    with pytest.raises(InvalidConfig, match=r"model_type 'new'\) does not give token_dim, num_attention_heads: set"):
        prefix_tuning(num_layers=3).filled({"model_type": "new"})


def test_dimensions_that_do_not_fit_together_are_refused() -> None:
    """A token_dim of the adapter must be a multiple of the heads, even if those come from the base model."""
    with pytest.raises(InvalidConfig, match="token_dim must be a multiple"):
        prefix_tuning(token_dim=9).filled(LLAMA)


def test_a_json_object_is_read() -> None:
    """`parse_json` returns the object of UTF-8 JSON with nested values."""
    assert parse_json('{"a": {"ü": [1, 2.5, null]}}'.encode(), "it") == {"a": {"ü": [1, 2.5, None]}}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not usable JSON"),
        (b"{", "not usable JSON"),
        (b"\xff{}", "not usable JSON"),
        (b'\xef\xbb\xbf{"a": 1}', "not usable JSON"),
        (b'{"a": 1, "a": 2}', "duplicate key 'a'"),
        (b'{"b": {"a": 1, "a": 1}}', "duplicate key 'a'"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{"a": -Infinity}', "-Infinity is not JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not usable JSON"),
        (b"[1]", "must be a JSON object, got list"),
        (b'{"a": ' + b"[" * 40 + b"]" * 40 + b"}", "nested more than 32 deep"),
        (b'{"a": ' + b"[" * 30_000 + b"]" * 30_000 + b"}", "not usable JSON"),
        (b" " * (MAX_CONFIG_BYTES + 1), "has 65537 bytes, more than 65536"),
    ],
)
def test_other_json_is_refused(data: bytes, message: str) -> None:
    """The error names the file and says which defect its JSON has."""
    with pytest.raises(InvalidConfig, match=message) as caught:
        parse_json(data, "adapter_config.json")
    assert caught.value.message.startswith("adapter_config.json")
