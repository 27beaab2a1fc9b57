"""What PEFT's `save_pretrained` names its files. Needs nothing."""

from typing import Final

CONFIG_NAME: Final = "adapter_config.json"
WEIGHTS_NAME: Final = "adapter_model.safetensors"
