"""`convert` makes a safe folder of pickles and foreign layouts, as strictly as possible."""

import itertools
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, load_file, save, save_file
from torch import nn

from prefix_service.checkpoints.base_models import read_fingerprint
from prefix_service.checkpoints.convert import convert, write
from prefix_service.checkpoints.sources import prepare_upload
from prefix_service.client import PrefixClient
from prefix_service.errors import InvalidCheckpoint, InvalidConfig, StorageFailed, UnsafeCheckpoint
from tests.cli.conftest import Run
from tests.conftest import CORPUS, Server

VARIANTS = CORPUS / "variants"


@pytest.mark.parametrize(
    ("variant", "source", "opened"),
    [
        ("hazy_cartridge-f1", "cache-step4.pt", "torch.nn's parameter containers"),
        ("legacy_bin-gpt2-n20-emb", "", "weights_only=True: tensors alone"),
        ("hf_peft_ex-prefixed", "", "nothing to unpickle"),
        ("ptuning_v2-llama-proj", "", "nothing to unpickle"),
        ("peft_full-accelerate-gpt2-proj", "", "nothing to unpickle"),
    ],
)
def test_what_was_converted_is_served_as_peft_computes_it(
    run: Run, server: Server, tmp_path: Path, variant: str, source: str, opened: str
) -> None:
    """A converted, published and fetched variant has the tensors of its case."""
    done = run("convert", VARIANTS / variant / source, tmp_path / "safe")
    assert done.returncode == 0, done.stderr
    assert opened in done.stdout
    name = f"converted/{variant.replace('_', '-')}"
    assert run("publish", tmp_path / "safe", name).returncode == 0
    assert_served(server, name, variant)


def assert_served(server: Server, name: str, variant: str) -> None:
    """Checks that the tensors of batches of 1 and 3 are PEFT's, exactly if no MLP ran."""
    about = json.loads((VARIANTS / variant / "variant.json").read_text())
    expected = load_file(CORPUS / about["expected"])
    with PrefixClient(server.url, server.admin_key) as client:
        prefix = client.get(name, dtype=about["kv_dtype"])
    for batch_size in (1, 3):
        for layer, pair in enumerate(prefix.for_batch(batch_size).past_key_values):
            for part, tensor in zip(("key", "value"), pair, strict=True):
                wanted = expected[f"b{batch_size}.layers.{layer}.{part}"]
                torch.testing.assert_close(tensor, wanted, rtol=0, atol=1e-5 if "proj" in about["expected"] else 0)


def test_a_full_checkpoint_is_served_as_it_was_cut(run: Run, server: Server) -> None:
    """`publish` alone serves a full training checkpoint in safetensors."""
    variant = "peft_full-accelerate-gpt2-proj"
    assert run("publish", VARIANTS / variant, "converted/cut").returncode == 0
    assert_served(server, "converted/cut", variant)


class Harmful:
    """An object whose unpickling creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_what_is_cut_out_is_the_file_that_safetensors_writes(tmp_path: Path) -> None:
    """The cut file is the one that safetensors writes, whatever the dtypes, so equal prefixes are one version."""
    source = VARIANTS / "peft_full-accelerate-gpt2-proj"
    tensors = load_file(source / "model.safetensors")
    for name, dtype in zip(sorted(tensors), itertools.cycle([torch.float32, torch.bfloat16, torch.float16])):
        tensors[name] = tensors[name].to(dtype)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
    upload = prepare_upload(tmp_path)
    assert upload.cut_from is not None
    cut = upload.weights.read()
    assert len({str(tensor.dtype) for tensor in load(cut).values()}) == 3
    assert cut == save({name: tensors[name] for name in load(cut)})


def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(run: Run, tmp_path: Path) -> None:
    """`convert` refuses a pickle that needs more than tensors, unless its owner says `--unsafe`."""
    checkpoint, mark = tmp_path / "evil.pt", tmp_path / "it-ran"
    torch.save({"prompt_embeddings": torch.zeros(20, 96), "harm": Harmful(mark)}, checkpoint)
    config = CORPUS / "cases/llama-n20-emb/adapter/adapter_config.json"
    refused = run("convert", checkpoint, tmp_path / "out", "--config", config)
    assert refused.returncode == 1
    assert "--unsafe" in refused.stderr
    assert not mark.exists()
    assert not (tmp_path / "out").exists()
    allowed = run("convert", checkpoint, tmp_path / "out", "--config", config, "--unsafe")
    assert allowed.returncode == 0, allowed.stderr
    assert "WITHOUT restriction" in allowed.stdout
    assert mark.exists()


@pytest.mark.parametrize("wrapper", ["state_dict", "module", "model_state_dict"])
def test_a_training_frameworks_wrapping_is_looked_through(tmp_path: Path, wrapper: str) -> None:
    """`convert` finds the prefix in the wrappers of Lightning, DeepSpeed and plain training loops."""
    state = {
        "base_model.lm_head.weight": torch.zeros(2, 2),
        "prompt_encoder.default.embedding.weight": torch.ones(20, 96),
    }
    torch.save({wrapper: state, "epoch": 3}, tmp_path / "last.ckpt")
    config = CORPUS / "cases/llama-n20-emb/adapter/adapter_config.json"
    conversion = convert(tmp_path / "last.ckpt", config=config)
    assert list(conversion.tensors) == ["prompt_encoder.default.embedding.weight"]


@pytest.mark.parametrize("projected", [False, True])
def test_a_checkpoint_without_a_config_takes_one_from_its_tensors(tmp_path: Path, projected: bool) -> None:
    """`convert` makes the config of a P-tuning v2 checkpoint from the base model's config.json and the tensors."""
    tensors = {"transformer.prefix_encoder.embedding.weight": torch.ones(7, 32 if projected else 3 * 2 * 32)}
    if projected:
        tensors |= {
            "transformer.prefix_encoder.trans.0.weight": torch.ones(9, 32),
            "transformer.prefix_encoder.trans.0.bias": torch.ones(9),
            "transformer.prefix_encoder.trans.2.weight": torch.ones(192, 9),
            "transformer.prefix_encoder.trans.2.bias": torch.ones(192),
        }
    save_file(tensors, tmp_path / "model.safetensors")
    config = convert(tmp_path, base_config=CORPUS / "bases/gpt2/config.json").config
    assert (config["num_virtual_tokens"], config["num_layers"], config["token_dim"]) == (7, 3, 32)
    assert (config["prefix_projection"], config["encoder_hidden_size"]) == (projected, 9 if projected else None)
    with pytest.raises(InvalidConfig, match="--base-config"):
        convert(tmp_path)


def test_a_cartridge_in_training_takes_its_config_from_its_tensors(tmp_path: Path) -> None:
    """`convert` counts frozen and trained rows for the config."""
    save_file(
        {"frozen_embedding": torch.ones(1, 192), "trainable_embedding": torch.ones(4, 192)}, tmp_path / "m.safetensors"
    )
    config = convert(tmp_path / "m.safetensors", base_config=CORPUS / "bases/gpt2/config.json").config
    assert (config["peft_type"], config["num_virtual_tokens"], config["num_frozen_tokens"]) == ("CARTRIDGE", 5, 1)


def test_what_cannot_be_converted_is_told(tmp_path: Path) -> None:
    """The error says what is wrong with a damaged file, a file without a prefix, or a folder with several."""
    (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04 not a zip")
    with pytest.raises(InvalidCheckpoint, match=r"was not written by torch\.save"):
        convert(tmp_path / "cut.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(InvalidCheckpoint, match="holds a list"):
        convert(tmp_path / "list.pt")
    with pytest.raises(InvalidCheckpoint, match="2 checkpoints"):
        convert(tmp_path)
    torch.save({"trainable_keys": [torch.ones(1, 2, 3, 4)], "trainable_values": []}, tmp_path / "odd.pt")
    with pytest.raises(InvalidCheckpoint, match="trainable_values"):
        convert(tmp_path / "odd.pt")
    (tmp_path / "raw.pkl").write_bytes(pickle.dumps(Harmful(tmp_path / "it-ran")))
    with pytest.raises((UnsafeCheckpoint, InvalidCheckpoint)):
        convert(tmp_path / "raw.pkl")
    assert not (tmp_path / "it-ran").exists()


LAYERS, HEADS, SIZE = 3, 2, 8
KV = ("keys", "values")


def cartridge(kind: str, frozen: int = 1, trainable: int = 5) -> dict[str, Any]:
    """Returns a file as the trainer saves it, its frozen lists named `kind`, as `ParameterList`s."""
    torch.manual_seed(1)
    return {
        f"{name}_{part}": nn.ParameterList(
            [nn.Parameter(torch.randn(1, HEADS, tokens, SIZE)) for _ in range(LAYERS if tokens else 0)]
        )
        for name, tokens in ((kind, frozen), ("trainable", trainable))
        for part in ("keys", "values")
    }


@pytest.mark.parametrize("kind", ["frozen", "fixed"])
@pytest.mark.parametrize("as_lists", [False, True], ids=["ParameterList", "list"])
def test_frozen_tokens_of_a_cartridge_come_first(tmp_path: Path, kind: str, as_lists: bool) -> None:
    """One frozen and five trainable tokens are six in that order, under both names of the frozen lists."""
    state = cartridge(kind)
    torch.save({n: [p.detach() for p in v] for n, v in state.items()} if as_lists else state, tmp_path / "cache.pt")
    conversion = convert(tmp_path / "cache.pt")
    sizes = {
        "num_virtual_tokens": 6,
        "num_frozen_tokens": 1,
        "num_layers": 3,
        "num_attention_heads": 2,
        "token_dim": 16,
    }
    assert conversion.config.items() >= sizes.items()
    flat = conversion.tensors["prompt_embeddings"].view(6, LAYERS, 2, HEADS, SIZE)
    for layer in range(LAYERS):
        for index, part in enumerate(("keys", "values")):
            wanted = torch.cat([state[f"{kind}_{part}"][layer], state[f"trainable_{part}"][layer]], dim=2)[0]
            assert torch.equal(flat[:, layer, index].transpose(0, 1), wanted)


@pytest.mark.parametrize("kind", ["frozen", "fixed"])
def test_a_cartridge_without_frozen_tokens(tmp_path: Path, kind: str) -> None:
    """A cartridge with empty frozen lists has no frozen tokens."""
    torch.save(cartridge(kind, frozen=0), tmp_path / "cache.pt")
    config = convert(tmp_path / "cache.pt").config
    assert (config["num_virtual_tokens"], config["num_frozen_tokens"]) == (5, 0)


def test_a_list_of_an_unknown_name_is_named(run: Run, tmp_path: Path) -> None:
    """`convert` drops nothing of a cartridge: it names a list that it does not know, and writes nothing."""
    torch.save({**cartridge("frozen"), "pinned_keys": [torch.zeros(1, 2, 3, 8)] * 3}, tmp_path / "cache.pt")
    done = run("convert", tmp_path / "cache.pt", tmp_path / "out")
    assert done.returncode == 1
    assert "pinned_keys" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fixed_keys": [torch.zeros(1, 2, 1, 8)] * 3}, "both frozen_ and fixed_"),
        ({"frozen_values": []}, "the cartridge has no frozen_values"),
        ({"trainable_values": [torch.zeros(1, 2, 5, 8)] * 2}, "trainable_values has 2 layers"),
        ({"trainable_values": [torch.zeros(1, 2, 4, 8)] * 3}, r"have \[4, 5\] tokens"),
        ({"trainable_values": [torch.zeros(1, 2, 5, 9)] * 3}, r"got \[1, 2, 5, 9\]"),
        ({"trainable_values": [torch.zeros(5)] * 3}, r"must hold one \[1, heads, tokens, size\] a layer"),
        ({"trainable_values": [torch.zeros(1, 2, 5, 8, dtype=torch.float64)] * 3}, "has dtype float64"),
        ({"trainable_values": [torch.full((1, 2, 5, 8), float("nan"))] * 3}, "NaN"),
        ({"trainable_keys": torch.zeros(3)}, "trainable_keys"),
        ({"trainable_keys": []}, "the cartridge has no trainable_keys"),
        (
            {f"{name}_{part}": [torch.zeros(1, 2, 0, 8)] for name in ("frozen", "trainable") for part in KV},
            "have no tokens",
        ),
        ({"trainable_keys.02": torch.zeros(1, 2, 5, 8)}, "has layer 2 of trainable_keys twice"),
    ],
)
def test_a_cartridge_that_does_not_fit_together(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    """The error names what in the cartridge contradicts itself."""
    torch.save({**cartridge("frozen"), **change}, tmp_path / "cache.pt")
    with pytest.raises(InvalidCheckpoint, match=message):
        convert(tmp_path / "cache.pt")


def test_a_config_that_contradicts_a_cartridge(tmp_path: Path) -> None:
    """`convert` uses a given config, and refuses one that contradicts the cartridge."""
    torch.save(cartridge("frozen"), tmp_path / "cache.pt")
    config = {**convert(tmp_path / "cache.pt").config, "revision": "main"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert convert(tmp_path / "cache.pt", config=tmp_path / "config.json").config["revision"] == "main"
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_frozen_tokens": 2}))
    with pytest.raises(InvalidConfig, match="contradicts the tensors in num_frozen_tokens"):
        convert(tmp_path / "cache.pt", config=tmp_path / "config.json")


def test_a_base_models_config_may_be_as_long_as_the_service_takes_it(tmp_path: Path) -> None:
    """The names of a classifier's labels take more than the 64 KiB of an adapter's config."""
    base = json.loads((CORPUS / "bases/gpt2/config.json").read_text())
    names = {str(label): f"label {label} of many" for label in range(4000)}
    (tmp_path / "config.json").write_text(json.dumps({**base, "id2label": names}))
    torch.save({"prompt_encoder.default.embedding.weight": torch.ones(20, 192)}, tmp_path / "m.pt")
    assert convert(tmp_path / "m.pt", base_config=tmp_path / "config.json").config["num_layers"] == base["n_layer"]
    assert read_fingerprint(tmp_path).architecture == "gpt2"


def test_what_is_left_out_is_told(run: Run, tmp_path: Path) -> None:
    """`convert` lists what it left out: the base model, the optimizer's tensors, and objects that may hold more."""
    state = {
        "state_dict": {"lm_head.weight": torch.zeros(2), "prompt_encoder.default.embedding.weight": torch.ones(20, 96)},
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}},
        "lists": [torch.zeros(1)],
    }
    torch.save(state, tmp_path / "last.ckpt")
    config = CORPUS / "cases/llama-n20-emb/adapter/adapter_config.json"
    done = run("convert", tmp_path / "last.ckpt", tmp_path / "out", "--config", config)
    names = "lists.0, lm_head.weight, optimizer.state.0.exp_avg"
    assert f"left out 3, not part of the prefix: {names}" in done.stdout
    as_json = run("convert", tmp_path / "last.ckpt", tmp_path / "again", "--config", config, "--json")
    assert sorted(json.loads(as_json.stdout)["left_out"]) == names.split(", ")


def test_what_a_pickle_may_do_to_its_reader(tmp_path: Path) -> None:
    """Cycles, repeated names, sparse and repeated tensors, and a folder as a file are refused."""
    config = CORPUS / "cases/llama-n20-emb/adapter/adapter_config.json"
    cycle: dict[str, Any] = {"a": 1}
    cycle["state_dict"] = cycle
    for state, message in (
        (cycle, "more than 32 levels|RecursionError"),
        ({"a": {"b": torch.zeros(1)}, "a.b": torch.zeros(1)}, "two tensors named a.b"),
        ({"prompt_embeddings": torch.zeros(1).expand(20, 96)}, "repeats the values of a smaller tensor"),
        ({"prompt_embeddings": torch.zeros(20, 96).to_sparse()}, "layout torch.sparse_coo"),
        ({"prompt_embeddings": torch.zeros(20, 96, dtype=torch.float64)}, "has dtype float64"),
    ):
        torch.save(state, tmp_path / "state.pt")
        with pytest.raises(InvalidCheckpoint, match=message):
            convert(tmp_path / "state.pt", config=config)
    with pytest.raises(InvalidCheckpoint, match="cannot be read: Is a directory"):
        convert(VARIANTS / "legacy_bin-gpt2-n20-emb", config=tmp_path)
    (tmp_path / "file").touch()
    conversion = convert(VARIANTS / "legacy_bin-gpt2-n20-emb")
    with pytest.raises(StorageFailed, match="cannot be written"):
        write(conversion, tmp_path / "file" / "folder")


def test_an_output_that_exists_is_not_written_over(run: Run, tmp_path: Path) -> None:
    """`convert` refuses a folder that has a conversion already."""
    source = VARIANTS / "legacy_bin-gpt2-n20-emb"
    assert run("convert", source, tmp_path / "out", "--json").returncode == 0
    again = run("convert", source, tmp_path / "out")
    assert again.returncode == 1
    assert "exists: choose an empty folder" in again.stderr


def test_a_flipped_bit_of_a_tensor_is_found(tmp_path: Path) -> None:
    """`convert` compares a zip's checksums, which torch.load does not."""
    torch.save(cartridge("frozen"), tmp_path / "cache.pt")
    with zipfile.ZipFile(tmp_path / "cache.pt") as archive:
        content = archive.read("cache/data/0")
    data = bytearray((tmp_path / "cache.pt").read_bytes())
    data[data.index(content)] ^= 1
    (tmp_path / "cache.pt").write_bytes(data)
    with pytest.raises(InvalidCheckpoint, match="data/0"):
        convert(tmp_path / "cache.pt")


def test_a_checkpoint_that_unpacks_to_more_than_it_has_is_refused(tmp_path: Path) -> None:
    """torch.load would read a compressed zip of a few bytes into as much memory as its directory says."""
    torch.save({"prompt_embeddings": torch.zeros(20, 96)}, tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as plain,
        zipfile.ZipFile(tmp_path / "cache.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    size = (tmp_path / "cache.pt").stat().st_size
    with pytest.raises(InvalidCheckpoint, match=rf"cache\.pt has {size} bytes and unpacks to \d+: .* save it again"):
        convert(tmp_path / "cache.pt", config=CORPUS / "cases/llama-n20-emb/adapter/adapter_config.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        (b"just a text", "was not written by torch.save"),
        (b"", "was not written by torch.save"),
    ],
)
def test_what_is_no_checkpoint_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    """The error says what a file without a checkpoint is, and does not advise `--unsafe`."""
    (tmp_path / "cache.pt").write_bytes(content)
    with pytest.raises(InvalidCheckpoint, match=message):
        convert(tmp_path / "cache.pt")


def test_another_kind_of_adapter_is_named(tmp_path: Path) -> None:
    """The error says that the folder is of LoRA, not that its tensors are unknown."""
    save_file({"lora_A.weight": torch.zeros(2, 2)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(InvalidConfig, match="this is a LORA adapter"):
        convert(tmp_path)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    """The error says what is missing."""
    with pytest.raises(InvalidCheckpoint, match=r"there are no weights in .*: expected adapter_model\.safetensors"):
        convert(tmp_path)


@pytest.mark.parametrize("command", ["convert", "publish"])
@pytest.mark.parametrize("option", ["--config", "--base-config"])
def test_a_folder_in_place_of_a_config_is_wrong_usage(run: Run, tmp_path: Path, command: str, option: str) -> None:
    """Both options take a file; a folder, as `--base-model` takes, is refused before anything is read."""
    source = VARIANTS / "legacy_bin-gpt2-n20-emb"
    done = run(command, source, tmp_path / "out", option, tmp_path)
    assert done.returncode == 2
    assert "is a directory" in done.stderr
