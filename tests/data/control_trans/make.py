"""Makes the checkpoints of this folder with the projects' own code; README.md has the commits and the commands.

Each folder gets a checkpoint as its project saves it, and `expected/` a file of its name: the keys and values that the
project's own code hands to the model.
"""

# mypy: ignore-errors
# It runs in another environment, which has the projects.

import contextlib
import hashlib
import importlib.util
import io
import logging
import shutil
import sys
import types
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

HERE = Path(__file__).parent
GPT2 = {"n_layer": 2, "n_head": 2, "n_embd": 8, "n_positions": 16, "vocab_size": 16}
LLAMA = {
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 16,
    "intermediate_size": 8,
    "vocab_size": 16,
    "max_position_embeddings": 32,
}
T5 = {"num_layers": 2, "num_heads": 2, "d_model": 8, "d_kv": 4, "d_ff": 8, "vocab_size": 16}


def expected(folder: Path, pairs: object) -> None:
    """Writes the `(2, 1, heads, tokens, size)` tensors of the layers."""
    tensors = {}
    for layer, (key, value) in enumerate(pairs):
        tensors[f"past_key_values.{layer}.key"] = key.detach().clone().contiguous()
        tensors[f"past_key_values.{layer}.value"] = value.detach().clone().contiguous()
    (HERE / "expected").mkdir(exist_ok=True)
    save_file(tensors, HERE / "expected" / f"{folder.name}.safetensors")


def emptied(name: str) -> Path:
    """Returns an empty folder of that name, here."""
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def loaded(path: Path) -> types.ModuleType:
    """Runs a source file, and returns its module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def li_liang(train_control: Path) -> None:
    """Runs the unmodified `gpt2/train_control.py`, which needs nothing but torch and transformers."""
    prefix_tuning = loaded(train_control).PrefixTuning

    class OldGPT2:
        """A model with the cache of transformers 3: a `(2, 1, heads, tokens, size)` tensor for each layer."""

        device = "cpu"

        def cuda(self) -> "OldGPT2":
            return self

        def __call__(self, tokens: torch.Tensor, **_: object) -> object:
            heads, size = GPT2["n_head"], GPT2["n_embd"] // GPT2["n_head"]
            layers = [torch.randn(2, 1, heads, tokens.shape[1], size) for _ in range(GPT2["n_layer"])]
            return type("Output", (), {"past_key_values": tuple(layers)})

    kinds = {
        "bottleneck": ({}, False),
        "deep": ({}, True),
        "flat": ({"init_shallow": "yes"}, False),
        "words": ({"init_shallow": "yes", "init_shallow_word": [[3, 1, 4]]}, False),
        "infix": ({"use_infix": True}, False),
    }
    for kind, (options, deep) in kinds.items():
        torch.manual_seed(1)
        config = GPT2Config(**GPT2)
        config._my_arg_task_mode, config.train_weights, config.optim_prefix = "webnlg", "no", True
        config.preseqlen, config.mid_dim = 3, 5
        for name, value in options.items():
            setattr(config, name, value)
        with contextlib.redirect_stdout(io.StringIO()):
            model = prefix_tuning(config, OldGPT2(), deep_param=deep).eval()
        folder = emptied(f"li_liang-{kind}")
        model.save_pretrained(folder, safe_serialization=False)
        if kind != "infix":
            expected(folder, model.get_prompt(bsz=1))


def adapterhub() -> None:
    """Runs the package adapters."""
    import adapters
    from adapters import PrefixTuningConfig

    kinds = {
        "gpt2-flat": (GPT2LMHeadModel(GPT2Config(**GPT2)), {"flat": True}),
        "gpt2-bottleneck": (GPT2LMHeadModel(GPT2Config(**GPT2)), {}),
        "llama-bottleneck": (LlamaForCausalLM(LlamaConfig(**LLAMA)), {"non_linearity": "relu"}),
        "gpt2-gated": (GPT2LMHeadModel(GPT2Config(**GPT2)), {"flat": True, "use_gating": True}),
        "t5-flat": (T5ForConditionalGeneration(T5Config(**T5)), {"flat": True}),
        "t5-decoder": (
            T5ForConditionalGeneration(T5Config(**T5)),
            {"flat": True, "encoder_prefix": False, "cross_prefix": False},
        ),
    }
    for kind, (model, options) in kinds.items():
        torch.manual_seed(1)
        adapters.init(model)
        model.add_adapter("own", PrefixTuningConfig(prefix_length=3, bottleneck_size=5, **options))
        folder = emptied(f"adapterhub-{kind}")
        model.eval().save_adapter(str(folder), "own")
        model.config.to_json_file(folder / "base_config.json")
        (prefix,) = (pool for name, pool in model.named_modules() if name.endswith("prefix_tunings.own"))
        if kind in ("gpt2-flat", "gpt2-bottleneck", "llama-bottleneck"):
            expected(folder, prefix(1)["self_prefix"])


def openprompt(prefix_tuning_template: Path) -> None:
    """Runs the unmodified `openprompt/prompts/prefix_tuning_template.py`; its package no longer installs."""

    class Template(torch.nn.Module):
        """Stands in for the part of OpenPrompt's base class that has no tensors."""

        def __init__(self, tokenizer: None, placeholder_mapping: dict[str, str]) -> None:
            super().__init__()

    for name, contents in {
        "openprompt": {"Template": Template},
        "openprompt.data_utils": {"InputFeatures": dict},
        "openprompt.utils": {},
        "openprompt.utils.logging": {"logger": logging.getLogger()},
    }.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(contents)
    template_class = loaded(prefix_tuning_template).PrefixTuningTemplate
    kinds = {
        "gpt2": (GPT2LMHeadModel(GPT2Config(**GPT2)), {}),
        "t5": (T5ForConditionalGeneration(T5Config(**T5)), {}),
        "t5-encoder": (T5ForConditionalGeneration(T5Config(**T5)), {"using_decoder_past_key_values": False}),
    }
    for kind, (model, options) in kinds.items():
        torch.manual_seed(1)
        template = template_class(model, None, num_token=3, mid_dim=5, **options).eval()
        folder = emptied(f"openprompt-{kind}")
        torch.save(template.state_dict(), folder / "template.ckpt")
        model.config.to_json_file(folder / "base_config.json")
        if kind == "gpt2":
            expected(folder, template.get_past_key_values()[1])


if __name__ == "__main__":
    li_liang(Path(sys.argv[1]))
    openprompt(Path(sys.argv[2]))
    adapterhub()
    sums = (f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(HERE)}\n" for path in HERE.glob("*/*"))
    (HERE / "SHA256SUMS").write_text("".join(sorted(sums, key=lambda line: line.split()[1])))
