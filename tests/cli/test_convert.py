"""`convert`: pickles and foreign layouts become a safe folder, as strictly as works."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from service.client import PrefixClient
from service.client.convert import convert
from service.errors import InvalidCheckpoint, InvalidConfig, UnsafeCheckpoint
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
    """Converted, published and fetched, the tensors are those of the case that the variant stands for."""
    done = run("convert", VARIANTS / variant / source, tmp_path / "safe")
    assert done.returncode == 0, done.stderr
    assert opened in done.stdout
    name = f"converted/{variant.replace('_', '-')}"
    assert run("publish", tmp_path / "safe", name).returncode == 0
    assert_served(server, name, variant)


def assert_served(server: Server, name: str, variant: str) -> None:
    """The tensors of batches of 1 and 3 are PEFT's; exactly so where no MLP ran."""
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
    """`publish` alone does for a full training checkpoint in safetensors."""
    variant = "peft_full-accelerate-gpt2-proj"
    assert run("publish", VARIANTS / variant, "converted/cut").returncode == 0
    assert_served(server, "converted/cut", variant)


class Harmful:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(run: Run, tmp_path: Path) -> None:
    """What needs more than tensors is refused, and --unsafe is the owner's word that it may run."""
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
    """Lightning, DeepSpeed and plain training loops wrap the state dict; the prefix is found inside."""
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
    """P-tuning v2 leaves the base model's config.json alone: what it tells, and the tensors, make the adapter's."""
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
    """Frozen and trained rows are counted."""
    save_file(
        {"frozen_embedding": torch.ones(1, 192), "trainable_embedding": torch.ones(4, 192)}, tmp_path / "m.safetensors"
    )
    config = convert(tmp_path / "m.safetensors", base_config=CORPUS / "bases/gpt2/config.json").config
    assert (config["peft_type"], config["num_virtual_tokens"], config["num_frozen_tokens"]) == ("CARTRIDGE", 5, 1)


def test_what_cannot_be_converted_is_told(tmp_path: Path) -> None:
    """Damaged files, files without a prefix, and folders with several checkpoints, each in words."""
    (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04 not a zip")
    with pytest.raises(InvalidCheckpoint, match=r"cannot be read|needs more"):
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


def test_an_output_that_exists_is_not_written_over(run: Run, tmp_path: Path) -> None:
    """The second conversion into one folder is refused."""
    source = VARIANTS / "legacy_bin-gpt2-n20-emb"
    assert run("convert", source, tmp_path / "out", "--json").returncode == 0
    again = run("convert", source, tmp_path / "out")
    assert again.returncode == 1
    assert "exists: choose an empty folder" in again.stderr
