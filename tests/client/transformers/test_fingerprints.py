"""The fingerprint of a model is the same in memory and in its folder, wherever that is, and another model's is not."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from prefix_service.checkpoints.base_models import read_fingerprint, tokenizer_hash
from prefix_service.client.transformers import fingerprint_of
from prefix_service.errors import InvalidCheckpoint, InvalidConfig
from tests.architectures import DECODERS, ENCODER_DECODERS, SLOT_COUNTING, Architecture, base
from tests.client.transformers.test_texts import tokenizer

_ONE_OF_EACH = {each.model: each for each in (*DECODERS, *SLOT_COUNTING, *ENCODER_DECODERS)}.values()


class Share(torch.nn.Parameter):
    """A weight of a library that has tensors of its own."""


@pytest.fixture(scope="module")
def model() -> Any:
    """Returns a small Llama."""
    return base("llama").eval()


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns its folder, with a tokenizer."""
    made = tmp_path_factory.mktemp("base")
    model.save_pretrained(made)
    tokenizer().save_pretrained(made)
    return made


@pytest.mark.parametrize("architecture", _ONE_OF_EACH, ids=lambda architecture: architecture.name)
def test_a_folder_has_the_fingerprint_of_its_model(architecture: Architecture, tmp_path: Path) -> None:
    """No setting and no weight differs between a model, its config, and the folder that transformers writes of it."""
    built = architecture.build()
    built.save_pretrained(tmp_path)
    found, known = read_fingerprint(tmp_path), fingerprint_of(built)
    assert found.differences(known) == []
    assert found.weights_index == known.weights_index
    assert found.weights_index is not None
    assert found.architecture == known.architecture == built.config.model_type
    assert found.differences(fingerprint_of(built.config)) == []
    assert known.sizes is not None
    assert "hidden_size" in known.sizes


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # a property that PEFT reads
def test_it_does_not_depend_on_the_path_or_the_shards(model: Any, folder: Path, tmp_path: Path) -> None:
    """The same model at another path, in many files, loaded in another dtype, or behind a LoRA, is the same."""
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    tokenizer().save_pretrained(tmp_path)
    (tmp_path / "consolidated.safetensors").write_bytes(b"another layout of the same weights")
    assert len([*tmp_path.glob("model-*.safetensors")]) > 2
    expected = read_fingerprint(folder)
    assert expected == read_fingerprint(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        found = fingerprint_of(loaded)
        assert found.differences(expected) == []
        assert (found.weights_index, found.tokenizer) == (expected.weights_index, expected.tokenizer)
    lora: Any = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules=["q_proj"]))
    assert fingerprint_of(lora).weights_index == expected.weights_index


def test_training_changes_it(model: Any, tmp_path: Path) -> None:
    """A fine-tuned model differs in its weights alone, also if one matrix of one layer was trained."""
    tuned = copy.deepcopy(model)
    tuned.model.layers[2].self_attn.v_proj.weight.data += 0.01
    tuned.save_pretrained(tmp_path)
    base_model = fingerprint_of(model)
    for changed in (fingerprint_of(tuned), read_fingerprint(tmp_path)):
        assert [field for field, *_ in base_model.differences(changed)] == ["weights_index"]


def test_more_tokens_are_another_tokenizer_for_the_same_weights(model: Any, folder: Path, tmp_path: Path) -> None:
    """A token that was added changes the tokenizer's hash, and neither sizes nor weights."""
    larger, words = copy.deepcopy(model), tokenizer()
    words.add_tokens(["<new>"])
    larger.resize_token_embeddings(70)
    larger.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    assert [name for name, *_ in read_fingerprint(folder).differences(read_fingerprint(tmp_path))] == ["tokenizer"]


def test_what_cannot_be_told_is_left_out(model: Any, folder: Path) -> None:
    """Offloaded, quantised and sharded weights have no hash, and float16 is compared with float16 alone."""
    assert fingerprint_of(copy.deepcopy(model).to("meta")).weights_index is None
    quantised = copy.deepcopy(model)
    integers = torch.ones(48, 32, dtype=torch.int8)
    quantised.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(integers, requires_grad=False)
    assert fingerprint_of(quantised).weights_index is None
    for share in (torch.nn.Parameter(torch.empty(0)), Share(torch.ones(48, 32))):
        sharded = copy.deepcopy(model)
        sharded.model.layers[0].mlp.up_proj.weight = share
        assert fingerprint_of(sharded).weights_index is None
    half = fingerprint_of(copy.deepcopy(model).half())
    assert half.weights_index is not None
    assert half.weights_index.startswith("sampled-float16-sha256:")
    assert half.differences(read_fingerprint(folder)) == []
    other = copy.deepcopy(model).half()
    other.model.layers[0].mlp.up_proj.weight.data += 0.1
    assert [name for name, *_ in half.differences(fingerprint_of(other))] == ["weights_index"]
    assert half.tokenizer is None


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("config.json", "{", InvalidConfig, "config.json"),
        ("model.safetensors", "broken", InvalidCheckpoint, "the weights in .* cannot be read"),
        ("model.safetensors.index.json", "{}", InvalidCheckpoint, "index.json names no files"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "b"}}', InvalidCheckpoint, "No such file"),
        ("tokenizer.json", "[]", InvalidCheckpoint, "tokenizer.json holds no tokenizer"),
        ("tokenizer.json", '{"model": {"vocab": [3]}}', InvalidCheckpoint, "tokenizer.json holds no tokenizer"),
    ],
)
def test_a_damaged_folder_is_named(
    folder: Path, tmp_path: Path, name: str, content: str, error: type[Exception], message: str
) -> None:
    """What cannot be read is an error where a folder was named, and unknown where a model was loaded from it."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).write_text(content)
    with pytest.raises(error, match=message):
        read_fingerprint(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    loaded.name_or_path = str(tmp_path)
    found = fingerprint_of(loaded)
    assert (found.tokenizer is None) == (name == "tokenizer.json")
    assert found.weights_index is not None


def test_pieces_in_a_list_have_ids_too(tmp_path: Path) -> None:
    """A unigram tokenizer's vocabulary is a list of pieces with scores, whose places are the ids."""
    for name, vocabulary in (("dict", {"a": 0, "b": 1}), ("list", [["a", -1.0], ["b", -2.0]])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
    found = tokenizer_hash(tmp_path / "dict")
    assert found is not None
    assert found == tokenizer_hash(tmp_path / "list")
