"""A compiled prefix does what PEFT's virtual tokens, or the same tokens in front of the input, do."""

import copy
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from accelerate import cpu_offload
from safetensors.torch import load_file, save_file

from prefix_service.client import Prefix, PrefixClient
from prefix_service.client.transformers import CompiledPrefix, compile_prefix
from prefix_service.client.transformers.caches import to_cache
from prefix_service.client.transformers.virtual_tokens import read_soft_prompt
from prefix_service.errors import (
    Conflict,
    DimensionMismatch,
    InvalidCheckpoint,
    InvalidConfig,
    InvalidRequest,
    PrefixServiceError,
)
from tests.architectures import LEFT, LENGTHS, NAMED, RIGHT, ROWS, base, padded
from tests.conftest import Server
from tests.soft_prompts import KINDS, TASK, task_of, train_soft_prompt

pytestmark = [
    # These are PEFT's and transformers' warnings, for a base model without a name, a property that PEFT reads, and
    # PEFT's loop of generation.
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning"),
]

NEW: dict[str, Any] = {"max_new_tokens": 8, "return_dict_in_generate": True, "output_logits": True}
TEXT = torch.randint(3, 64, (1, 12), generator=torch.Generator().manual_seed(3))
"""Twelve tokens: fewer than a window of 16, more than one of 4."""

Served = Callable[[str, CompiledPrefix], Prefix]


@pytest.fixture(scope="module")
def served(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Served:
    """Returns a function that publishes a compiled prefix to the real server, and fetches it."""

    def publish_and_get(name: str, compiled: CompiledPrefix) -> Prefix:
        folder = tmp_path_factory.mktemp("compiled") / "adapter"
        compiled.save(folder)
        with PrefixClient(server.url, server.admin_key) as client:
            client.publish(f"compiled/{name.lower().replace('_', '-')}", folder)
            return client.get(f"compiled/{name.lower().replace('_', '-')}")

    return publish_and_get


@pytest.fixture(scope="session")
def soft_prompt(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """Returns the folder in which PEFT saved a soft prompt of a kind that it trained for an architecture."""

    def saved(name: str, kind: str) -> Path:
        return train_soft_prompt(NAMED[name].build(), kind, 6, tmp_path_factory.mktemp(kind.lower()))

    return cache(saved)


def require_same(found: Any, expected: Any, width: int, theirs: int) -> None:
    """Checks new tokens behind `width` and `theirs` input ids, and the logits of each step."""
    assert torch.equal(found.sequences[:, width:], expected.sequences[:, theirs:])
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), rtol=0, atol=5e-5)


# --- Tokens ---


@pytest.mark.parametrize(
    "name",
    [
        *("llama", "gpt2", "qwen3", "opt", "bloom", "falcon-grouped", "falcon-alibi-16-heads", "gpt-bigcode"),
        *("mistral", "mistral-short-window", "gemma2-short-window", "gemma3", "gemma3-short-window", "gemma4"),
        *("gemma4-shared-layers", "gemma4-wider-sliding-layers", "mpt", "gpt-neo-local", "bart-decoder"),
    ],
)
def test_behind_compiled_tokens_a_model_says_what_it_says_behind_the_tokens(
    name: str, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy tokens and logits of padded rows are those of transformers with the same tokens in front."""
    monkeypatch.setattr("prefix_service.client.transformers.compiling._CHUNK", 5)
    model = base(name)
    prefix = served(name, compile_prefix(model, token_ids=TEXT[0].tolist()))
    whole = {
        "input_ids": torch.cat([TEXT.expand(3, -1), padded(LEFT)], 1),
        "attention_mask": torch.cat([torch.ones(3, TEXT.shape[1]), LEFT], 1),
    }
    found = prefix.generate(model, input_ids=padded(LEFT), attention_mask=LEFT, **NEW)
    require_same(found, model.generate(**whole, **NEW), LEFT.shape[1], whole["input_ids"].shape[1])
    tokens = prefix.generate(model, input_ids=padded(RIGHT), attention_mask=RIGHT, max_new_tokens=8)
    for row, own in enumerate(ROWS):
        ids = torch.cat([TEXT, own], 1)
        alone = model.generate(ids, attention_mask=torch.ones(ids.shape), max_new_tokens=8)[0, ids.shape[1] :]
        assert torch.equal(tokens[row, RIGHT.shape[1] :], alone)


# --- Soft prompts ---


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "qwen3", "mistral-short-window", "gemma2-short-window", "gemma3", "opt", "bloom"]
)
def test_a_compiled_soft_prompt_does_what_it_does_in_peft(
    name: str, kind: str, soft_prompt: Callable[[str, str], Path], served: Served
) -> None:
    """Greedy tokens and logits are PEFT's, for padded rows and for each row alone."""
    folder, model = soft_prompt(name, kind), base(name)
    prefix = served(f"{name}-{kind}", compile_prefix(model, adapter=folder, task=task_of(kind)))
    theirs = NAMED[name].peft(folder)
    inputs: dict[str, Any] = {"input_ids": padded(LEFT), "attention_mask": LEFT}
    chosen = {} if task_of(kind) is None else {"task_ids": torch.tensor([TASK])}
    tasks = {} if task_of(kind) is None else {"task_ids": torch.tensor([TASK] * 3)}
    # PEFT drops positions, so that models which take them count the padding on the left.
    own = {} if name in ("opt", "bloom") else {"position_ids": torch.arange(LEFT.shape[1]).expand(3, -1)}
    found = prefix.generate(model, **inputs, **own, **NEW)
    require_same(found, theirs.generate(**inputs, **tasks, **NEW), LEFT.shape[1], LEFT.shape[1])
    tokens = prefix.generate(model, input_ids=padded(RIGHT), attention_mask=RIGHT, max_new_tokens=8)
    for row, (ids, length) in enumerate(zip(ROWS, LENGTHS, strict=True)):
        alone = theirs.generate(input_ids=ids, max_new_tokens=8, **chosen)[0, length:]
        assert torch.equal(tokens[row, RIGHT.shape[1] :], alone)


def test_the_models_weights_can_be_trained_afterwards(soft_prompt: Callable[[str, str], Path]) -> None:
    """PEFT freezes the model that it wraps; compiling does not leave it frozen."""
    model = NAMED["llama"].build().requires_grad_(True)
    compile_prefix(model, adapter=soft_prompt("llama", "P_TUNING"))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_an_initialisation_that_is_gone_is_not_looked_for(soft_prompt: Callable[[str, str], Path]) -> None:
    """The weights of a MULTITASK adapter replace what its training began with, a file of another task."""
    folder = soft_prompt("gpt2", "MULTITASK_PROMPT_TUNING")
    expected = compile_prefix(base("gpt2"), adapter=folder, task=2)
    path = folder / "adapter_config.json"
    before = json.loads(path.read_text())
    gone = {"prompt_tuning_init": "EXACT_SOURCE_TASK", "prompt_tuning_init_state_dict_path": "gone.safetensors"}
    path.write_text(json.dumps(before | gone))
    assert torch.equal(compile_prefix(base("gpt2"), adapter=folder, task=2).flat, expected.flat)
    path.write_text(json.dumps(before))
    assert not torch.equal(compile_prefix(base("gpt2"), adapter=folder, task=0).flat, expected.flat)


# --- What is written ---


def test_peft_itself_serves_what_was_compiled(tmp_path: Path) -> None:
    """The folder is a CARTRIDGE adapter of PEFT, and gives the logits of the tokens in front."""
    compile_prefix(base("llama"), token_ids=TEXT[0].tolist()).save(tmp_path)
    found = NAMED["llama"].peft(tmp_path)(input_ids=ROWS[0], position_ids=torch.arange(ROWS[0].shape[1])[None]).logits
    expected = base("llama")(torch.cat([TEXT, ROWS[0]], 1)).logits[:, TEXT.shape[1] :]
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-5)


def test_the_recipe_stays_with_the_version(
    server: Server, soft_prompt: Callable[[str, str], Path], tmp_path: Path
) -> None:
    """`publish` makes the recipe annotations, and one that the caller gives replaces one of the recipe."""
    kind = "MULTITASK_PROMPT_TUNING"
    compile_prefix(base("llama"), adapter=soft_prompt("llama", kind), task=1).with_recipe(file="a.txt").save(tmp_path)
    with PrefixClient(server.url, server.admin_key) as client:
        client.publish("compiled/recipe", tmp_path, annotations={"compiled/dtype": "mine", "run": "17"})
        found = client.annotations("compiled/recipe@1")
    assert found.pop("compiled/transformers") == transformers.__version__
    assert found.pop("compiled/peft") == peft.__version__
    assert found.pop("compiled/prefix-service")
    assert found == {
        "compiled/dtype": "mine",
        "compiled/file": "a.txt",
        "compiled/from": kind,
        "compiled/task": "1",
        "run": "17",
    }


@pytest.mark.parametrize(
    ("recipe", "message"),
    [("[]", "is no recipe: it must be"), ('{"a": 1}', "annotation a must be text"), (" " * 70_000, "more than 65536")],
)
def test_a_recipe_that_is_none_is_refused(server: Server, tmp_path: Path, recipe: str, message: str) -> None:
    """A `prefix_recipe.json` of another kind is named, before anything is sent."""
    compile_prefix(base("llama"), token_ids=[5]).save(tmp_path)
    (tmp_path / "prefix_recipe.json").write_text(recipe)
    with PrefixClient(server.url, server.admin_key) as client, pytest.raises(InvalidRequest, match=message):
        client.publish("compiled/refused", tmp_path)


def test_a_fingerprint_that_is_none_is_refused(server: Server, tmp_path: Path) -> None:
    """A `prefix_base_model.json` of another kind is named, before anything is sent."""
    compile_prefix(base("llama"), token_ids=[5]).save(tmp_path)
    (tmp_path / "prefix_base_model.json").write_text('{"sizes": 3}')
    message = "prefix_base_model.json is no fingerprint: sizes must be a JSON object, got 3"
    with PrefixClient(server.url, server.admin_key) as client, pytest.raises(InvalidRequest, match=message):
        client.publish("compiled/refused", tmp_path)


def test_a_prefix_takes_the_models_dtype_and_an_empty_folder(tmp_path: Path) -> None:
    """Keys are stored as the model computes them; a folder that has an adapter is left as it is."""
    compiled = compile_prefix(NAMED["llama"].build().to(torch.bfloat16), token_ids=[5, 6])
    compiled.save(tmp_path)
    assert load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"].dtype == torch.bfloat16
    with pytest.raises(Conflict, match="choose an empty folder"):
        compiled.save(tmp_path)


def test_progress_counts_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Progress is reported after each chunk."""
    monkeypatch.setattr("prefix_service.client.transformers.compiling._CHUNK", 5)
    told: list[tuple[int, int]] = []
    compile_prefix(base("llama"), token_ids=TEXT[0].tolist(), progress=lambda *both: told.append(both))
    assert told == [(5, 12), (10, 12), (12, 12)]


def test_where_frequencies_change_with_the_length_the_text_is_read_in_one_piece(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In chunks, the first would have the frequencies of a short input (longrope)."""
    monkeypatch.setattr("prefix_service.client.transformers.compiling._CHUNK", 5)
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
    rope |= {"original_max_position_embeddings": 8}
    model = replace(NAMED["llama"], config={**NAMED["llama"].config, "rope_parameters": rope}).build()
    require_logits_of_text(model, heads=2)


def test_a_causal_model_whose_config_has_no_decoder_is_compiled_for() -> None:
    """GPT-NeoX (Pythia) is causal, although `is_decoder` is false in its config."""
    require_logits_of_text(_tiny("GPTNeoX", "cpu", intermediate_size=48, initializer_range=0.15), heads=4)


def require_logits_of_text(model: Any, heads: int) -> None:
    """Checks the logits behind a compiled text, of a model with heads of size 8."""
    flat = compile_prefix(model, token_ids=TEXT[0].tolist()).flat
    # (N, L*2*H*D) -> (L, 2, 1, H, N, D)
    pairs = flat.view(12, -1, 2, heads, 8).permute(1, 2, 3, 0, 4)[:, :, None]
    cache = to_cache([(pair[0], pair[1]) for pair in pairs], model.config)
    positions = torch.arange(12, 12 + ROWS[0].shape[1])[None]
    with torch.no_grad():
        found = model(ROWS[0], past_key_values=cache, position_ids=positions).logits
        expected = model(torch.cat([TEXT, ROWS[0]], 1)).logits[:, 12:]
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-5)


def test_a_model_with_offloaded_embeddings_reads_tokens() -> None:
    """Their weights are on the device `meta` until they are looked up, and tokens there would have no numbers."""
    ids = TEXT[0].tolist()
    model: Any = copy.deepcopy(base("llama"))
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.get_input_embeddings().weight.is_meta
    assert torch.equal(compile_prefix(model, token_ids=ids).flat, compile_prefix(base("llama"), token_ids=ids).flat)


# --- Refusals ---


def _tiny(family: str, device: str = "meta", **more: Any) -> Any:
    config = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4} | more
    auto: Any = transformers.AutoModelForCausalLM
    with torch.device(device):
        return auto.from_config(getattr(transformers, f"{family}Config")(vocab_size=64, **config)).eval()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: base("t5"), "t5 is an encoder-decoder model"),
        (lambda: base("bert-token"), "BertForTokenClassification is no language model"),
        (lambda: _tiny("Bert", "cpu", initializer_range=0.15), "attention of BertLMHeadModel is not causal"),
        (lambda: _tiny("Llama", "cpu", is_causal=False), "attention of LlamaForCausalLM is not causal"),
        (
            lambda: _tiny("Gemma3Text", "cpu", num_key_value_heads=2, use_bidirectional_attention=True),
            "attention of Gemma3ForCausalLM is not causal",
        ),
        (lambda: _tiny("DeepseekV3", num_key_value_heads=4), "deepseek_v3 keeps compressed keys and values"),
        (lambda: _tiny("Mamba"), "MambaModel takes no past_key_values|of type"),
        (lambda: NAMED["llama"].build().train(), "the model is in training"),
        (lambda: base("llama").model, "LlamaModel is no language model"),
    ],
    ids=[
        "encoder-decoder",
        "classifier",
        "encoder",
        "two directions",
        "two directions of Gemma 3",
        "latent attention",
        "state space",
        "training",
        "no language model",
    ],
)
def test_a_model_that_cannot_be_compiled_for_is_named(build: Callable[[], Any], message: str) -> None:
    """The error comes before the tokens are read: models on the device `meta` compute nothing."""
    with pytest.raises(InvalidRequest, match=message):
        compile_prefix(build(), token_ids=[5, 6])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "pass one of adapter, text and token_ids"),
        ({"token_ids": [5], "text": "a"}, "pass one of adapter, text and token_ids"),
        ({"token_ids": [5], "task": 1}, "task 1 belongs to an adapter"),
        ({"text": "a"}, "pass text and tokenizer together"),
        ({"token_ids": []}, "there are no tokens"),
        ({"token_ids": [5] * 96}, "there are 96 tokens, and llama has positions for 96"),
        ({"token_ids": [5, 64]}, "token 1 is 64, and the model's are 0 to 63"),
        ({"token_ids": [5, True]}, "token 1 is True"),
        ({"token_ids": torch.tensor([5, 6])}, r"token 0 is tensor\(5\)"),
    ],
)
def test_arguments_that_make_no_prefix_are_named(options: dict[str, Any], message: str) -> None:
    """Each error says what was wrong, with the value."""
    with pytest.raises(InvalidRequest, match=message):
        compile_prefix(base("llama"), **options)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"peft_type": "PREFIX_TUNING"}, InvalidConfig, "is a prefix already: publish it"),
        ({"peft_type": "LORA"}, InvalidConfig, "is of peft_type 'LORA'|is of peft_type \"LORA\""),
        ({"task_type": "SEQ_2_SEQ_LM"}, InvalidConfig, "only adapters of causal language models"),
        ({"modules_to_save": ["embed_tokens"]}, InvalidConfig, "also changes layers of the base model"),
        ({"peft_type": "MULTITASK_PROMPT_TUNING"}, InvalidCheckpoint, "have no prefix_task_cols"),
        (
            {"num_virtual_tokens": 1 << 30},
            InvalidCheckpoint,
            "num_virtual_tokens is 1073741824 in the config, and 6 by",
        ),
        ({"num_virtual_tokens": None}, InvalidCheckpoint, "num_virtual_tokens is missing"),
        ({"prompt_tuning_init": "TEXT"}, InvalidCheckpoint, "PEFT cannot load .* tokenizer_name_or_path can't be None"),
        ({"token_dim": 1 << 30}, InvalidCheckpoint, "token_dim is 1073741824 in the config, and 32 by"),
    ],
)
def test_an_adapter_that_is_no_soft_prompt_is_named(
    changed: dict[str, Any],
    error: type[PrefixServiceError],
    message: str,
    soft_prompt: Callable[[str, str], Path],
    tmp_path: Path,
) -> None:
    """The config says what the adapter is, and the error what to do with it."""
    folder = shutil.copytree(soft_prompt("llama", "PROMPT_TUNING"), tmp_path / "adapter")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    with pytest.raises(error, match=message):
        compile_prefix(base("llama"), adapter=folder)


def test_an_adapter_leaves_the_base_model_alone(soft_prompt: Callable[[str, str], Path], tmp_path: Path) -> None:
    """PEFT loads a tensor of the model's own names into it, and the prefix would be that of another model."""
    folder = shutil.copytree(soft_prompt("llama", "PROMPT_TUNING"), tmp_path / "adapter")
    weights, model = folder / "adapter_model.safetensors", base("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    name = "model.layers.0.self_attn.k_proj.weight"
    save_file(load_file(weights) | {f"base_model.{name}": torch.ones_like(before[name])}, weights)
    with pytest.raises(InvalidCheckpoint, match=f"more than virtual tokens \\(base_model.{name}\\)"):
        compile_prefix(model, adapter=folder)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_numbers_that_are_not_finite_are_named(soft_prompt: Callable[[str, str], Path], tmp_path: Path) -> None:
    """The service would refuse the prefix, after its upload."""
    folder = shutil.copytree(soft_prompt("llama", "PROMPT_TUNING"), tmp_path / "adapter")
    weights = folder / "adapter_model.safetensors"
    save_file({"prompt_embeddings": load_file(weights)["prompt_embeddings"] * float("nan")}, weights)
    with pytest.raises(InvalidRequest, match="NaN or infinite in float32"):
        compile_prefix(base("llama"), adapter=folder)


def test_the_config_of_many_examples_is_read(tmp_path: Path) -> None:
    """CPT's has three lists with a number for each virtual token, on a line of its own."""
    tokens = 4000
    lists = dict.fromkeys(("cpt_token_ids", "cpt_mask", "cpt_tokens_type_mask"), [1] * tokens)
    config = {"peft_type": "CPT", "task_type": "CAUSAL_LM", "num_virtual_tokens": tokens, **lists}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config, indent=2))
    save_file({"prompt_embeddings": torch.zeros(tokens, 2)}, tmp_path / "adapter_model.safetensors")
    assert read_soft_prompt(tmp_path).num_virtual_tokens == tokens


def test_weights_that_do_not_fit_are_named(soft_prompt: Callable[[str, str], Path], tmp_path: Path) -> None:
    """Missing weights, others, those of another width, and a task that is out of range."""
    with pytest.raises(InvalidConfig, match="there is no"):
        compile_prefix(base("llama"), adapter=tmp_path)
    folder = shutil.copytree(soft_prompt("llama", "PROMPT_TUNING"), tmp_path / "adapter")
    with pytest.raises(InvalidRequest, match="has no tasks"):
        compile_prefix(base("llama"), adapter=folder, task=1)
    with pytest.raises(InvalidRequest, match="this one has 0 to 2, and got 3"):
        compile_prefix(base("llama"), adapter=soft_prompt("llama", "MULTITASK_PROMPT_TUNING"), task=3)
    weights = folder / "adapter_model.safetensors"
    save_file({"prompt_embeddings": torch.zeros(5, 32)}, weights)
    with pytest.raises(InvalidCheckpoint, match="num_virtual_tokens is 6 in the config, and 5 by"):
        compile_prefix(base("llama"), adapter=folder)
    save_file({"prompt_embeddings": torch.zeros(6, 16)}, weights)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"token_dim": 16}))
    with pytest.raises(DimensionMismatch, match="have 16 numbers, and the embeddings of the model 32"):
        compile_prefix(base("llama"), adapter=folder)
    save_file({"lora_A": torch.zeros(6, 16)}, weights)
    with pytest.raises(InvalidCheckpoint, match="has no prompt_embeddings"):
        compile_prefix(base("llama"), adapter=folder)
    weights.unlink()
    with pytest.raises(InvalidCheckpoint, match="save_pretrained"):
        compile_prefix(base("llama"), adapter=folder)


def test_what_is_missing_is_named(soft_prompt: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without PEFT the error has the `pip install` to paste."""
    folder = soft_prompt("llama", "PROMPT_TUNING")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InvalidRequest, match=r"pip install 'prefix-service\[compile\]'"):
        compile_prefix(base("llama"), adapter=folder)


def test_virtual_tokens_have_no_ids_to_look_up(soft_prompt: Callable[[str, str], Path]) -> None:
    """Gemma 4 looks up its layers' inputs by token ids: PEFT fails there, and the error says so."""
    with pytest.raises(InvalidRequest, match="looks up its layers' inputs by token ids"):
        compile_prefix(base("gemma4"), adapter=soft_prompt("gemma3", "PROMPT_TUNING"))
