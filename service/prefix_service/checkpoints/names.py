"""What PEFT's `save_pretrained` names its files. Needs nothing."""

from typing import Final

CONFIG_NAME: Final = "adapter_config.json"
CARD_NAME: Final = "README.md"
WEIGHTS_NAME: Final = "adapter_model.safetensors"
