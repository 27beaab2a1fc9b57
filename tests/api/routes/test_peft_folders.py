"""Folders that PEFT writes and loads: the service accepts them, and serves PEFT's keys and values bit for bit.

PEFT is the oracle: each folder is written by `save_pretrained`, changed where a test says so, loaded by
`PeftModel.from_pretrained`, and uploaded to a running service.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import httpx
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn

from tests.api.helpers import assert_same, problem, tensors_of, upload, versions_path
from tests.conftest import Server

# PEFT asks transformers for something that transformers deprecates, and warns of unknown keys.
pytestmark = pytest.mark.filterwarnings("ignore")

TENANT: Final = "peft-folders"
TOKENS: Final = 4
BASE: Final = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=32, vocab_size=16, pad_token_id=0)
CONFIGS: Final[dict[str, Any]] = {"PREFIX_TUNING": peft.PrefixTuningConfig, "CARTRIDGE": peft.CartridgeConfig}


@pytest.fixture(scope="module")
def client(server: Server) -> httpx.Client:
    """A platform admin."""
    return server.client()


class Head(nn.Module):
    """A task head with tensors of every kind that torch saves, under names that modules may have."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)  # its num_batches_tracked is an int64 scalar
        self.layers = nn.ModuleDict({"a/b": nn.Linear(2, 2), "a\\b": nn.Linear(2, 2), "long" * 200: nn.Linear(1, 1)})
        self.register_buffer("flags", torch.tensor([True, False, True]))
        self.register_buffer("counts", torch.arange(3, dtype=torch.int32))
        self.register_buffer("bytes", torch.arange(5, dtype=torch.uint8))
        self.register_buffer("empty", torch.zeros(0, 3))
        self.register_buffer("none", torch.zeros(0, dtype=torch.int64))
        self.register_buffer("doubles", torch.ones(2, dtype=torch.float64))
        self.register_buffer("complexes", torch.ones(2, dtype=torch.complex64))
        self.register_buffer("volume", torch.zeros([1] * 12))


def base_model(head: bool = False) -> Any:
    """A tiny GPT-2, with a head for classification."""
    torch.manual_seed(0)
    model = transformers.GPT2ForSequenceClassification(BASE) if head else transformers.GPT2LMHeadModel(BASE)
    if head:
        model.score = Head()
    return model


def written(folder: Path, peft_type: str = "PREFIX_TUNING", head: bool = False, **values: Any) -> Path:
    """The folder, with an adapter of random weights as PEFT's `save_pretrained` writes it."""
    task = "SEQ_CLS" if head else "CAUSAL_LM"
    model: Any = peft.get_peft_model(
        base_model(head), CONFIGS[peft_type](num_virtual_tokens=TOKENS, task_type=task, **values)
    )
    model.save_pretrained(folder)
    return folder


def by_peft(folder: Path, head: bool = False) -> dict[str, Tensor]:
    """The keys and values that PEFT makes of a folder, under the names of the wire."""
    loaded: Any = peft.PeftModel.from_pretrained(base_model(head), folder)
    cache = loaded.get_prompt(batch_size=1)
    return {
        f"past_key_values.{index}.{part}": tensor
        for index, layer in enumerate(cache.layers)
        for part, tensor in (("key", layer.keys), ("value", layer.values))
    }


def posted(client: httpx.Client, name: str, folder: Path) -> httpx.Response:
    """Upload the folder with the base model's config."""
    config = (folder / "adapter_config.json").read_bytes()
    file = (folder / "adapter_model.safetensors").read_bytes()
    return upload(client, TENANT, name, config, file, BASE.to_dict())


def assert_served(client: httpx.Client, name: str, expected: Mapping[str, Tensor]) -> None:
    """The adapter's keys and values are the expected ones, bit for bit."""
    served = tensors_of(client.get(f"/v1/tenants/{TENANT}/adapters/{name}/prefix"))
    served.pop("attention_mask")
    assert served.keys() == expected.keys()
    for key, tensor in expected.items():
        assert_same(served[key], tensor.detach())


def test_a_task_head_of_every_dtype_size_and_name_is_not_the_prefix(client: httpx.Client, tmp_path: Path) -> None:
    """Counters, flags, empty buffers, float64, and modules named with a slash: PEFT loads them, the service skips
    them, and the file is kept byte for byte."""
    folder = written(tmp_path, head=True)
    neighbours = load_file(folder / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in neighbours.values()} >= {torch.int64, torch.bool, torch.float64, torch.complex64}
    assert any("/" in name for name in neighbours)
    assert max(map(len, neighbours)) > 800
    answer = posted(client, "head", folder)
    assert answer.status_code == 201, answer.text
    assert_served(client, "head", by_peft(folder, head=True))
    kept = client.get(f"/v1/tenants/{TENANT}/adapters/head/parameters").content
    assert kept == (folder / "adapter_model.safetensors").read_bytes()


def test_metadata_that_is_null(client: httpx.Client, tmp_path: Path) -> None:
    """`"__metadata__": null` is read as no metadata, as the safetensors library reads it."""
    folder = written(tmp_path)
    path = folder / "adapter_model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.dumps({**json.loads(data[8 : 8 + length]), "__metadata__": None}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    assert load_file(path).keys() == {"prompt_embeddings"}
    assert posted(client, "metadata", folder).status_code == 201
    assert_served(client, "metadata", by_peft_without_format(folder, data))


def by_peft_without_format(folder: Path, original: bytes) -> dict[str, Tensor]:
    """PEFT's tensors of the file before its metadata was replaced."""
    (folder / "adapter_model.safetensors").write_bytes(original)
    return by_peft(folder)


@pytest.mark.parametrize("frozen", [0, 1, TOKENS])
def test_a_cartridge_in_training_whose_rows_are_frozen(client: httpx.Client, tmp_path: Path, frozen: int) -> None:
    """None, some or all rows: PEFT's own state, which it loads back, is served as PEFT serves it."""
    folder = written(tmp_path, "CARTRIDGE", num_frozen_tokens=frozen)
    loaded: Any = peft.PeftModel.from_pretrained(base_model(), folder)
    encoder = loaded.prompt_encoder["default"]
    state = encoder.state_dict()
    assert state["trainable_embedding"].shape[0] == TOKENS - frozen
    save_file(state, folder / "state.safetensors")
    encoder.load_state_dict(load_file(folder / "state.safetensors"))  # PEFT loads it
    expected = by_peft(folder)
    (folder / "state.safetensors").rename(folder / "adapter_model.safetensors")
    answer = posted(client, f"frozen-{frozen}", folder)
    assert answer.status_code == 201, answer.text
    assert_served(client, f"frozen-{frozen}", expected)


def test_no_other_tensor_of_a_prefix_may_be_empty(client: httpx.Client, tmp_path: Path) -> None:
    """Zero trainable rows beside fewer frozen rows than tokens are a contradiction."""
    folder = written(tmp_path, "CARTRIDGE", num_frozen_tokens=1)
    state = {"frozen_embedding": torch.zeros(1, 64), "trainable_embedding": torch.zeros(0, 64)}
    save_file(state, folder / "adapter_model.safetensors")
    assert "[0, 64]" in problem(posted(client, "empty", folder), 422, "invalid-checkpoint")["detail"]


# What a config may hold although it looks wrong; PEFT loads each beside weights that are flat.
ODD: dict[str, tuple[str, dict[str, Any]]] = {
    "hidden size 0": ("PREFIX_TUNING", {"encoder_hidden_size": 0}),
    "hidden size 0 of a cartridge": ("CARTRIDGE", {"encoder_hidden_size": 0}),
    "projection without a size": ("PREFIX_TUNING", {"prefix_projection": True, "encoder_hidden_size": None}),
    "projection of size 0": ("PREFIX_TUNING", {"prefix_projection": True, "encoder_hidden_size": 0}),
    "projection in training": (
        "PREFIX_TUNING",
        {"prefix_projection": True, "encoder_hidden_size": None, "inference_mode": False},
    ),
    "modules as a string": ("PREFIX_TUNING", {"modules_to_save": "classifier"}),
    "modules as numbers": ("CARTRIDGE", {"modules_to_save": [1, 2]}),
    "version as a number": ("PREFIX_TUNING", {"peft_version": 0.21}),
    "revision as a number": ("CARTRIDGE", {"revision": 7}),
    "null flags": ("PREFIX_TUNING", {"inference_mode": None, "prefix_projection": None}),
    "null flag of a cartridge": ("CARTRIDGE", {"inference_mode": None}),
    "odd mapping": ("PREFIX_TUNING", {"auto_mapping": "a text"}),
    "odd initialisation": ("PREFIX_TUNING", {"init_weights": ["zero"]}),
    "infinity": ("PREFIX_TUNING", {"written_later": float("inf"), "another": [{"a": -float("inf")}], "kept": 1}),
    "infinity in a field that nothing reads": ("CARTRIDGE", {"auto_mapping": {"a": float("inf")}}),
    "a seed of 64 bits": ("PREFIX_TUNING", {"seed": (1 << 64) - 1}),
    "null sizes": ("PREFIX_TUNING", {"num_layers": None, "num_attention_heads": None, "token_dim": None}),
}


@pytest.mark.parametrize("case", ODD)
def test_a_config_that_peft_reads(client: httpx.Client, tmp_path: Path, case: str) -> None:
    """PEFT loads it, so the service does, and the keys and values are PEFT's."""
    peft_type, values = ODD[case]
    folder, name = written(tmp_path, peft_type), f"odd-{case.replace(' ', '-')}"
    expected = by_peft(folder)
    _change(folder, values)
    assert peft.PeftConfig.from_pretrained(str(folder)).peft_type == peft_type
    if "modules_to_save" not in values:  # whose letters or numbers PEFT takes for the names of the base's modules
        assert all(torch.equal(tensor, expected[key]) for key, tensor in by_peft(folder).items())
    answer = posted(client, name, folder)
    assert answer.status_code == 201, answer.text
    assert_served(client, name, expected)


def test_a_value_that_canonical_json_cannot_hold_is_left_out(client: httpx.Client, tmp_path: Path) -> None:
    """The key that holds it is not stored; every other unknown key is."""
    folder = written(tmp_path)
    _change(folder, {"far": float("inf"), "deep": [{"a": -float("inf")}], "seed": 1 << 63, "kept": [1, "a"]})
    stored = posted(client, "left-out", folder).json()["config"]
    assert stored["kept"] == [1, "a"]
    assert not {"far", "deep", "seed"} & stored.keys()


@pytest.mark.parametrize("name", ["num_virtual_tokens", "token_dim", "encoder_hidden_size", "num_layers"])
@pytest.mark.parametrize("value", ["Infinity", "NaN", "1e999"])
def test_a_size_that_is_not_finite_is_refused(client: httpx.Client, tmp_path: Path, name: str, value: str) -> None:
    """What the service reads is never left out."""
    folder = written(tmp_path)
    _change(folder, {name: "HERE"})
    path = folder / "adapter_config.json"
    path.write_text(path.read_text().replace('"HERE"', value))
    problem(posted(client, "not-finite", folder), 422, "invalid-config")


def test_an_untrained_projection_still_needs_its_size(client: httpx.Client) -> None:
    """Without flat weights the projection is run, so its size must be known and positive."""
    sizes = {"num_virtual_tokens": 2, "num_layers": 1, "num_attention_heads": 1, "token_dim": 4}
    for size in (None, 0):
        config = {**sizes, "peft_type": "PREFIX_TUNING", "prefix_projection": True, "encoder_hidden_size": size}
        answer = client.post(versions_path(TENANT, "projected"), json={"config": config})
        assert "encoder_hidden_size" in problem(answer, 422, "invalid-config")["detail"]


def test_a_base_model_that_leans_on_defaults(client: httpx.Client) -> None:
    """google/gemma-3-4b's own config.json has no heads; with it the adapter's dimensions are complete."""
    config = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 2, "inference_mode": True}
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "num_hidden_layers": 34, "intermediate_size": 10240}
    file = save({"prompt_embeddings": torch.zeros(2, 34 * 2 * 4 * 256)})
    answer = upload(client, TENANT, "gemma", config, file, {"model_type": "gemma3", "text_config": text})
    assert answer.status_code == 201, answer.text
    assert {n: answer.json()[n] for n in ("num_layers", "num_kv_heads", "head_dim")} == {
        "num_layers": 34,
        "num_kv_heads": 4,
        "head_dim": 256,
    }


def test_the_message_does_not_ask_for_the_file_that_was_sent(client: httpx.Client) -> None:
    """It names the model type, what the file leaves open, and what to do."""
    config = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 2}
    answer = upload(client, TENANT, "open", config, base={"model_type": "of-next-year", "hidden_size": 8})
    detail = problem(answer, 422, "invalid-config")["detail"]
    assert "of-next-year" in detail
    assert "num_layers, num_attention_heads" in detail
    assert "send the base model" not in detail


# Types of the fields that the service reads: another type is 422, also where PEFT would not look at the value.
_INTEGER: Final = (int, type(None))
READ: Final[dict[str, tuple[type, ...]]] = {
    "peft_type": (str,),
    "task_type": (str, type(None)),
    "base_model_name_or_path": (str, type(None)),
    "inference_mode": (bool, type(None)),
    "num_virtual_tokens": (int,),
    "token_dim": _INTEGER,
    "num_transformer_submodules": _INTEGER,
    "num_attention_heads": _INTEGER,
    "num_layers": _INTEGER,
    "encoder_hidden_size": _INTEGER,
}
READ_OF: Final[dict[str, dict[str, tuple[type, ...]]]] = {
    "PREFIX_TUNING": {**READ, "prefix_projection": (bool, type(None))},
    "CARTRIDGE": {**READ, "num_frozen_tokens": (int,)},
}
VALUES: Final = [None, True, -1, 0.5, "text", ["a"], {"a": 1}]
UNKNOWN: Final = ["from_the_future", "runtime_config", "model_config", "filled", "__class__", "encoder_hidden_size"]
FIELDS: Final = [
    (peft_type, name)
    for peft_type, config_type in CONFIGS.items()
    for name in dict.fromkeys([*(field.name for field in dataclasses.fields(config_type)), *UNKNOWN])
]


@pytest.mark.parametrize(("peft_type", "name"), FIELDS)
def test_every_field_with_every_kind_of_value(client: httpx.Client, tmp_path: Path, peft_type: str, name: str) -> None:
    """A wrong type of a field that the service reads is 422, with and without weights, and never 500. Everything else
    that PEFT loads is accepted, and served as PEFT computes it."""
    folder = written(tmp_path, peft_type)
    config = json.loads((folder / "adapter_config.json").read_text())
    for value in VALUES:
        changed = {**config, name: value}
        (folder / "adapter_config.json").write_text(json.dumps(changed))
        answer = posted(client, "table", folder)
        fresh = client.post(versions_path(TENANT, "table-fresh"), json={"config": changed})
        assert fresh.status_code in (200, 201, 422), (value, fresh.text)
        if _is_refused(peft_type, name, value):
            problem(answer, 422, "invalid-config")
            problem(fresh, 422, "invalid-config")
        elif (expected := _loaded(folder)) is not None:
            assert answer.status_code in (200, 201), (value, answer.text)
            version = answer.json()["version"]
            assert_served(client, f"table@{version}", expected)
        else:
            assert answer.status_code in (200, 201, 422), (value, answer.text)


def _is_refused(peft_type: str, name: str, value: Any) -> bool:
    """Whether the service reads the field, and the value has another type or is negative."""
    types = READ_OF[peft_type].get(name)
    if (peft_type, name) == ("CARTRIDGE", "encoder_hidden_size"):
        types = (*_INTEGER, bool, float)  # it has no encoder, and numbers under that name were always kept
    return types is not None and (type(value) not in types or value == -1)


def _loaded(folder: Path) -> dict[str, Tensor] | None:
    """PEFT's keys and values, or None if it cannot load the folder, for whatever reason it has."""
    try:
        return by_peft(folder)
    except Exception:  # noqa: BLE001 - PEFT checks nothing, so anything is raised
        return None


def _change(folder: Path, values: Mapping[str, Any]) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
