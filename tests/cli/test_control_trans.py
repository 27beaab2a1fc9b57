"""`convert` reads the prefixes of Li & Liang's PrefixTuning, AdapterHub and OpenPrompt as their own code does."""

import hashlib
import json
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from safetensors.torch import load_file

from prefix_service.checkpoints.convert import Conversion, convert, write
from prefix_service.checkpoints.sources import prepare_upload
from prefix_service.errors import InvalidCheckpoint, InvalidConfig
from prefix_service.prefix.kv import PrefixKV
from tests.cli.conftest import Run
from tests.conftest import CORPUS

FILES: Final = Path(__file__).parents[1] / "data" / "control_trans"


def converted(name: str, **options: Any) -> Conversion:
    """Converts a checkpoint of another project, with its base model's config."""
    folder = FILES / name
    base = folder / ("config.json" if name.startswith("li_liang") else "base_config.json")
    return convert(folder, **{"base_config": base, **options})


def pairs_of(conversion: Conversion) -> PrefixKV:
    """Returns the keys and values as the service computes them."""
    config = conversion.config
    return PrefixKV.from_flat(
        conversion.tensors["prompt_embeddings"],
        num_layers=config["num_layers"],
        num_kv_heads=config["num_attention_heads"],
        num_transformer_submodules=config["num_transformer_submodules"],
    )


def test_the_files_are_those_that_the_projects_made() -> None:
    """The hashes in `SHA256SUMS` are those of the files, and no file is without one."""
    sums = {f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(FILES)}" for path in FILES.glob("*/*")}
    assert sums == set((FILES / "SHA256SUMS").read_text().splitlines())


@pytest.mark.parametrize(
    ("name", "project", "is_exact"),
    [
        ("li_liang-flat", "Li & Liang", True),
        ("li_liang-words", "Li & Liang", True),
        ("li_liang-bottleneck", "Li & Liang", False),
        ("li_liang-deep", "Li & Liang", False),
        ("adapterhub-gpt2-flat", "AdapterHub", True),
        ("adapterhub-gpt2-bottleneck", "AdapterHub", False),
        ("adapterhub-llama-bottleneck", "AdapterHub", False),
        ("openprompt-gpt2", "OpenPrompt", False),
    ],
)
def test_keys_and_values_are_those_of_the_projects_own_code(name: str, project: str, is_exact: bool) -> None:
    """They are equal bit for bit; through an MLP, whose last bits depend on the processor, to 1e-6."""
    conversion = converted(name)
    assert conversion.found.startswith(project)
    expected, kv = load_file(FILES / "expected" / f"{name}.safetensors"), pairs_of(conversion).tensor
    assert len(expected) == 2 * len(kv)
    for layer, pair in enumerate(kv):
        for part, tensor in zip(("key", "value"), pair, strict=True):
            wanted = expected[f"past_key_values.{layer}.{part}"][0]
            torch.testing.assert_close(tensor, wanted, rtol=0, atol=0 if is_exact else 1e-6)


def test_a_converted_prefix_can_be_published(run: Run, tmp_path: Path) -> None:
    """`convert` writes a folder that `publish` takes, and says what it left out."""
    folder = FILES / "openprompt-gpt2"
    done = run("convert", folder, tmp_path / "out", "--base-config", folder / "base_config.json")
    assert done.returncode == 0, done.stderr
    assert "found OpenPrompt: 2 layers, 3 tokens; decoder_control_trans.0.bias, " in done.stdout
    assert "left out 1, not part of the prefix: input_tokens" in done.stdout
    upload = prepare_upload(tmp_path / "out")
    with upload.weights:
        assert upload.cut_from is None


@pytest.mark.parametrize(
    ("name", "error", "reason"),
    [
        ("li_liang-infix", InvalidCheckpoint, "those added to the input's own keys and values"),
        ("adapterhub-gpt2-gated", InvalidCheckpoint, "gates, which depend on the input"),
        ("adapterhub-t5-flat", InvalidConfig, "encoder-decoder"),
        ("adapterhub-t5-decoder", InvalidConfig, "encoder-decoder"),
        ("openprompt-t5", InvalidConfig, "encoder-decoder"),
        ("openprompt-t5-encoder", InvalidConfig, "encoder-decoder"),
    ],
)
def test_what_is_no_prefix_of_a_decoder_is_refused(name: str, error: type[Exception], reason: str) -> None:
    """The error says why the checkpoint is not past_key_values of a decoder."""
    with pytest.raises(error, match=reason):
        converted(name)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("adapterhub-t5-flat", "more than a prefix of a decoder's self-attention .*cross_prefix"),
        ("openprompt-t5", "more than a prefix of a decoder's self-attention"),
        ("openprompt-t5-encoder", "OpenPrompt's prefix of the encoder"),
    ],
)
def test_prefixes_of_encoders_are_refused_whatever_the_base_config_says(name: str, reason: str) -> None:
    """The names of the tensors are enough to refuse a prefix of an encoder or of cross-attention."""
    with pytest.raises(InvalidCheckpoint, match=reason):
        converted(name, base_config=FILES / "openprompt-gpt2" / "base_config.json")


@pytest.mark.parametrize(
    ("setting", "value", "reason"),
    [
        ("prefix_length", 4, "prefix_length is 4 in AdapterHub's config, and the prefix has 3 tokens"),
        ("leave_out", [1], r"leave_out is \[1\]"),
        ("use_gating", True, "use_gating is true"),
        ("architecture", "lora", "architecture must be prefix_tuning, got 'lora'"),
        ("non_linearity", "mish", "non_linearity must be one of tanh, relu, .*, got 'mish'"),
    ],
)
def test_adapterhubs_config_is_respected(tmp_path: Path, setting: str, value: Any, reason: str) -> None:
    """A setting that makes another prefix than these tensors do is an error that names it."""
    values = json.loads((FILES / "adapterhub-gpt2-bottleneck" / "adapter_config.json").read_text())
    values["config"][setting] = value
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    with pytest.raises(InvalidConfig, match=reason):
        converted("adapterhub-gpt2-bottleneck", config=tmp_path / "adapter_config.json")


def test_the_base_model_must_fit(tmp_path: Path) -> None:
    """Another base model's config, or none, is an error that says what is missing or does not fit."""
    with pytest.raises(InvalidConfig, match="--base-config"):
        converted("li_liang-flat", base_config=None)
    other = CORPUS / "bases" / "gpt2" / "config.json"
    with pytest.raises(InvalidCheckpoint, match=r"control_trans has shape \[96\].* 3 layers of 4 heads of size 8"):
        converted("li_liang-flat", base_config=other)
    with pytest.raises(InvalidCheckpoint, match=r"makes 32 values for a token, .* are 192"):
        converted("li_liang-bottleneck", base_config=other)


def test_a_bottleneck_of_embeddings_is_a_soft_prompt(tmp_path: Path) -> None:
    """Li & Liang's PrefixEmbTuning makes embeddings, not keys and values."""
    state = {
        "wte.weight": torch.ones(3, 8),
        "control_trans.0.weight": torch.ones(5, 8),
        "control_trans.0.bias": torch.ones(5),
        "control_trans.2.weight": torch.ones(8, 5),
        "control_trans.2.bias": torch.ones(8),
    }
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(InvalidCheckpoint, match="this is a soft prompt of embeddings"):
        convert(tmp_path, base_config=FILES / "openprompt-gpt2" / "base_config.json")
    del state["control_trans.2.bias"]
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(InvalidCheckpoint, match=r"incomplete prefix: control_trans\.2\.bias missing"):
        convert(tmp_path, base_config=FILES / "openprompt-gpt2" / "base_config.json")


def test_a_written_config_stays(tmp_path: Path) -> None:
    """A PEFT config beside the checkpoint is kept, unless it contradicts the tensors."""
    first = converted("li_liang-flat")
    write(first, tmp_path)
    config = tmp_path / "adapter_config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {"revision": "abc"}))
    assert converted("li_liang-flat", config=config).config["revision"] == "abc"
    config.write_text(json.dumps(values | {"num_virtual_tokens": 4}))
    with pytest.raises(InvalidConfig, match="contradicts the tensors in num_virtual_tokens"):
        converted("li_liang-flat", config=config)
