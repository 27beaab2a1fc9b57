"""The names of the files that PEFT's `save_pretrained` writes."""

from typing import Final

CONFIG_NAME: Final = "adapter_config.json"
CARD_NAME: Final = "README.md"
WEIGHTS_NAME: Final = "adapter_model.safetensors"
