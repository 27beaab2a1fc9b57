"""SmolLM2-135M-Instruct as a folder that vLLM reads, from the GGUF file that the demo reads."""

from pathlib import Path
from typing import Final

from prefix_service.cli.demo.model import LanguageModel, load_model

_TEMPLATE: Final = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Without a system prompt, as the adapters were trained."""


def save_model(gguf: Path, folder: Path) -> LanguageModel:
    """Write the folder, in float32; the model that it holds."""
    loaded = load_model(gguf)
    model, tokenizer = loaded.model, loaded.tokenizer
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    weights = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}  # tied
    model.save_pretrained(folder, state_dict=weights)
    tokenizer.chat_template = _TEMPLATE
    tokenizer.save_pretrained(folder)
    return loaded
