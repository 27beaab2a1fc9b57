"""Tiny models of the architectures that prefix tuning meets, and adapters for them, written by PEFT itself.

Weights are drawn wide (0.15), so that a prefix, a position or a mask that is wrong shows in the logits.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

NUM_VIRTUAL_TOKENS = 6
VOCABULARY = 64

_COMMON = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
_SMALL = _COMMON | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 96,
    "initializer_range": 0.15,
}
_GROUPED = _SMALL | {"num_key_value_heads": 2}
_GEMMA = _GROUPED | {"num_hidden_layers": 4, "head_dim": 16}
_GEMMA4 = _GEMMA | {
    "global_head_dim": 32,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCABULARY,
}
_FALCON = _SMALL | {"ffn_hidden_size": 48, "new_decoder_architecture": False, "multi_query": False}
_GPT2 = _COMMON | {"n_layer": 3, "n_head": 4, "n_embd": 32, "n_positions": 96, "initializer_range": 0.15}


@dataclass(frozen=True)
class Architecture:
    """A model to build from a seed, and the options of PEFT's config in addition to the number of virtual tokens."""

    name: str
    model: str
    """`<model>` in transformers' `<family>Config` and model class: `Llama:LlamaForCausalLM`."""
    config: Mapping[str, Any]
    task: str = "CAUSAL_LM"
    method: str = "PREFIX_TUNING"
    adapter: Mapping[str, Any] = field(default_factory=dict)
    num_virtual_tokens: int = NUM_VIRTUAL_TOKENS

    def build(self) -> Any:
        """Returns the base model: float32, frozen, in evaluation, with the same weights each time."""
        family, _, name = self.model.partition(":")
        config = getattr(transformers, f"{family}Config")(**self.config)
        torch.manual_seed(11)
        model = getattr(transformers, name)(config)
        torch.manual_seed(12)
        for parameter in model.parameters():  # biases and norms are not drawn wide by every model
            parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
        return model.eval().requires_grad_(False)

    def save_adapter(self, folder: Path) -> Path:
        """Saves an adapter with random weights in `folder`, as PEFT's `save_pretrained` writes it."""
        config_type = {"PREFIX_TUNING": peft.PrefixTuningConfig, "CARTRIDGE": peft.CartridgeConfig}[self.method]
        options = {"num_virtual_tokens": self.num_virtual_tokens, "task_type": self.task, **self.adapter}
        model = peft.get_peft_model(self.build(), config_type(**options))
        torch.manual_seed(13)
        for parameter in model.prompt_encoder.parameters():
            nn.init.normal_(parameter, std=0.8)
        model.save_pretrained(folder)
        return folder

    def peft(self, folder: Path) -> Any:
        """Returns PEFT's own model with the adapter from `folder`."""
        return peft.PeftModel.from_pretrained(self.build(), folder).eval()

    @property
    def accepts_position_ids(self) -> bool:
        """Returns whether the model takes positions: BLOOM and MPT have none, BART and encoder-decoders count."""
        return self.task == "CAUSAL_LM" and self.name not in ("bloom", "mpt", "bart-decoder")


def _windowed(window: int) -> dict[str, Any]:
    return {"sliding_window": window}


DECODERS = [
    Architecture("gpt2", "GPT2:GPT2LMHeadModel", _GPT2),
    Architecture("gpt2-projection", "GPT2:GPT2LMHeadModel", _GPT2, adapter={"prefix_projection": True}),
    Architecture("llama", "Llama:LlamaForCausalLM", _GROUPED),
    Architecture("llama-projection", "Llama:LlamaForCausalLM", _GROUPED, adapter={"prefix_projection": True}),
    Architecture(
        "llama-cartridge", "Llama:LlamaForCausalLM", _GROUPED, method="CARTRIDGE", adapter={"num_frozen_tokens": 1}
    ),
    Architecture("mistral", "Mistral:MistralForCausalLM", _GROUPED | _windowed(16)),
    Architecture("mistral-short-window", "Mistral:MistralForCausalLM", _GROUPED | _windowed(4)),
    Architecture("qwen3", "Qwen3:Qwen3ForCausalLM", _GROUPED | {"head_dim": 16}),
    Architecture("gemma2", "Gemma2:Gemma2ForCausalLM", _GEMMA | _windowed(16)),
    Architecture("gemma2-short-window", "Gemma2:Gemma2ForCausalLM", _GEMMA | _windowed(4)),
    Architecture("gemma3", "Gemma3Text:Gemma3ForCausalLM", _GEMMA | _windowed(16) | {"layer_types": None}),
    Architecture(
        "gemma3-short-window",
        "Gemma3Text:Gemma3ForCausalLM",
        _GEMMA | _windowed(4) | {"layer_types": _GEMMA4["layer_types"]},
    ),
    Architecture("gemma4", "Gemma4Text:Gemma4ForCausalLM", _GEMMA4 | _windowed(16)),
    Architecture("gemma4-short-window", "Gemma4Text:Gemma4ForCausalLM", _GEMMA4 | _windowed(4)),
    Architecture(
        "gemma4-shared-layers",
        "Gemma4Text:Gemma4ForCausalLM",
        _GEMMA4 | _windowed(16) | {"num_kv_shared_layers": 2},
    ),
    Architecture(
        "gemma4-wider-sliding-layers",
        "Gemma4Text:Gemma4ForCausalLM",
        _GEMMA4 | _windowed(16) | {"attention_k_eq_v": True, "num_global_key_value_heads": 1},
    ),
    Architecture("opt", "OPT:OPTForCausalLM", _SMALL | {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.15}),
    Architecture(
        "bloom",
        "Bloom:BloomForCausalLM",
        _COMMON | {"hidden_size": 32, "n_layer": 3, "n_head": 4, "initializer_range": 0.15},
    ),
    Architecture("falcon-rotary", "Falcon:FalconForCausalLM", _FALCON | {"alibi": False}),
    Architecture(
        "falcon-alibi-16-heads", "Falcon:FalconForCausalLM", _FALCON | {"alibi": True, "num_attention_heads": 16}
    ),
    Architecture(
        "falcon-grouped",
        "Falcon:FalconForCausalLM",
        _FALCON | {"alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    Architecture(
        "falcon-multi-query",
        "Falcon:FalconForCausalLM",
        _FALCON | {"alibi": False, "multi_query": True},
        adapter={"num_attention_heads": 1, "token_dim": 8},
    ),
    Architecture(
        "gpt-bigcode",
        "GPTBigCode:GPTBigCodeForCausalLM",
        _GPT2 | {"multi_query": True},
        adapter={"num_attention_heads": 1, "token_dim": 8},
    ),
]

# These count slots of the cache, or see a window of them, in an attention of their own.
SLOT_COUNTING = [
    Architecture(
        "mpt",
        "Mpt:MptForCausalLM",
        _COMMON | {"d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 96, "initializer_range": 0.15},
        adapter={"num_attention_heads": 4, "token_dim": 32, "num_layers": 3},
    ),
    Architecture(
        "gpt-neo-local",
        "GPTNeo:GPTNeoForCausalLM",
        _COMMON
        | {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "intermediate_size": 48, "window_size": 4}
        | {"attention_types": [[["local", "global"], 1]], "max_position_embeddings": 96, "initializer_range": 0.15},
    ),
    Architecture(
        "bart-decoder",
        "Bart:BartForCausalLM",
        _COMMON
        | {"d_model": 32, "decoder_layers": 3, "encoder_layers": 3, "decoder_ffn_dim": 48, "encoder_ffn_dim": 48}
        | {"decoder_attention_heads": 4, "encoder_attention_heads": 4, "max_position_embeddings": 96}
        | {"init_std": 0.15, "forced_eos_token_id": None},
    ),
]

ENCODER_DECODERS = [
    Architecture(
        "t5",
        "T5:T5ForConditionalGeneration",
        _COMMON | {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 4, "num_heads": 4, "decoder_start_token_id": 0},
        task="SEQ_2_SEQ_LM",
    ),
    Architecture(
        "t5-shallow-decoder",
        "T5:T5ForConditionalGeneration",
        _COMMON
        | {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 4}
        | {"decoder_start_token_id": 0},
        task="SEQ_2_SEQ_LM",
    ),
    Architecture(
        "bart",
        "Bart:BartForConditionalGeneration",
        _COMMON
        | {"d_model": 32, "encoder_layers": 3, "decoder_layers": 3, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
        | {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 96}
        | {"init_std": 0.15, "decoder_start_token_id": 1, "forced_eos_token_id": None},
        task="SEQ_2_SEQ_LM",
    ),
]

ENCODERS = [
    Architecture("bert-sequence", "Bert:BertForSequenceClassification", _SMALL, task="SEQ_CLS"),
    Architecture("bert-token", "Bert:BertForTokenClassification", _SMALL, task="TOKEN_CLS"),
]

_ALL = [*DECODERS, *SLOT_COUNTING, *ENCODER_DECODERS, *ENCODERS]
NAMED = {architecture.name: architecture for architecture in _ALL}
base = cache(lambda name: NAMED[name].build())
"""The base model of that name, built once."""

# The three rows of tokens, and the masks that pad them on the right and on the left.
LENGTHS = (7, 4, 5)
RIGHT = torch.tensor([[1] * length + [0] * (max(LENGTHS) - length) for length in LENGTHS])
LEFT = RIGHT.flip(1)
TOKENS = torch.randint(3, VOCABULARY, RIGHT.shape, generator=torch.Generator().manual_seed(1))
ROWS = [TOKENS[row : row + 1, :length] for row, length in enumerate(LENGTHS)]


def padded(mask: Tensor) -> Tensor:
    """Returns the rows' tokens where the mask is 1 and pad ids elsewhere, `[3, 7]`."""
    ids = torch.zeros_like(mask)
    for row, tokens in enumerate(ROWS):
        ids[row, mask[row] == 1] = tokens[0]
    return ids
