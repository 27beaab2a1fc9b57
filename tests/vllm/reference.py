"""Makes a small model with random weights and adapters of PEFT for it, and generates with PEFT."""

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from peft import PeftModel, PrefixTuningConfig, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig

VOCABULARY: Final = 1000
TOKENS: Final = {"a": 20, "b": 20, "c": 64, "d": 45, "b2": 20, "large": 300}
"""Virtual tokens of each adapter: less than a block of 32, two whole blocks, one and a part, and many."""
_PROMPTS: Final = {"tiny": 5, "short": 13, "middle": 37, "long": 90}


@dataclass(frozen=True, slots=True)
class Said:
    """Greedy tokens, and the log probability of each."""

    tokens: list[int]
    logprobs: list[float]


@dataclass
class Reference:
    """The model's folder, and PEFT's answers with it."""

    folder: Path
    prompts: dict[str, list[int]]
    tasks: dict[str, int] = field(default_factory=dict)
    """The task that PEFT is asked for, of each adapter that has tasks."""
    _known: dict[tuple[str | None, str, int], Said] = field(default_factory=dict)
    _models: dict[str | None, Any] = field(default_factory=dict)

    @property
    def model(self) -> Path:
        """Returns the folder that vLLM reads."""
        return self.folder / "model"

    def adapter(self, name: str) -> Path:
        """Returns the folder that PEFT wrote."""
        return self.folder / name

    def join(self, *names: str) -> str:
        """Makes an adapter of the tokens of these adapters, one after another, and returns its name."""
        name = "+".join(names)
        if not self.adapter(name).exists():
            shutil.copytree(self.adapter(names[0]), self.adapter(name))
            parts = [load_file(self.adapter(one) / "adapter_model.safetensors")["prompt_embeddings"] for one in names]
            joined = torch.cat(parts)  # (tokens, layers*2*heads*dim)
            save_file({"prompt_embeddings": joined}, self.adapter(name) / "adapter_model.safetensors")
            config = json.loads((self.adapter(name) / "adapter_config.json").read_text())
            config["num_virtual_tokens"] = len(joined)
            (self.adapter(name) / "adapter_config.json").write_text(json.dumps(config))
        return name

    def says(self, adapter: str | None, prompt: str, count: int) -> Said:
        """Returns what PEFT generates greedily, in float32, and remembers it."""
        key = (adapter, prompt, count)
        if key not in self._known:
            self._known[key] = self.generate(adapter, prompt, count)
        return self._known[key]

    def generate(self, adapter: str | None, named: str, count: int, **more: Any) -> Said:
        """Returns what PEFT generates with more options of transformers."""
        prompt = self.prompts[named]
        ids = torch.tensor([prompt])
        options = {"max_new_tokens": count, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        tasks = {"task_ids": torch.tensor([self.tasks[adapter]])} if adapter in self.tasks else {}
        with torch.inference_mode():
            made = self._loaded(adapter).generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                output_logits=True,
                return_dict_in_generate=True,
                **options,
                **tasks,
                **more,
            )
        tokens = made.sequences[0, len(prompt) :].tolist()
        steps = [torch.log_softmax(logits[0], -1) for logits in made.logits]
        return Said(tokens, [float(step[token]) for step, token in zip(steps, tokens, strict=True)])

    def scores(self, adapter: str | None, named: str, tokens: list[int]) -> torch.Tensor:
        """Returns the log probability of every token at each step, `[tokens, vocabulary]`, while PEFT is made to say
        these tokens, in float32."""
        prompt = self.prompts[named]
        ids = torch.tensor([[*prompt, *tokens]])
        with torch.inference_mode():
            logits = self._loaded(adapter)(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
        return torch.log_softmax(logits[len(prompt) - 1 : -1].float(), -1)

    def _loaded(self, adapter: str | None) -> Any:
        if adapter not in self._models:
            base = AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32)
            tuned = base if adapter is None else PeftModel.from_pretrained(base, self.adapter(adapter))
            self._models[adapter] = tuned.train(mode=False)
        return self._models[adapter]


def _llama() -> PreTrainedConfig:
    return LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=VOCABULARY,
        max_position_embeddings=2048,
        pad_token_id=0,
        initializer_range=0.08,
        dtype="float32",
    )


def make_reference(
    folder: Path, config: PreTrainedConfig | None = None, adapters: Iterable[str] = tuple(TOKENS)
) -> Reference:
    """Writes a model, a Llama if there is no config of another, and its adapters."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config or _llama())  # type: ignore[no-untyped-call]
    model.save_pretrained(folder / "model")
    for name in adapters:
        torch.manual_seed(100 + list(TOKENS).index(name))
        base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
        tokens = TOKENS[name]
        tuned = get_peft_model(base, PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=tokens))
        for parameter in tuned.prompt_encoder.parameters():
            torch.nn.init.normal_(parameter)
        tuned.save_pretrained(str(folder / name))
    torch.manual_seed(7)
    prompts = {name: torch.randint(6, VOCABULARY, (length,)).tolist() for name, length in _PROMPTS.items()}
    return Reference(folder, prompts)
