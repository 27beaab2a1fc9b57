"""The names of the files that PEFT's `save_pretrained` writes; uploads use them, too."""

from typing import Final

CONFIG_NAME: Final = "adapter_config.json"
CARD_NAME: Final = "README.md"
WEIGHTS_NAME: Final = "adapter_model.safetensors"

PICKLE_SUFFIXES: Final = (".bin", ".ckpt", ".pkl", ".pt", ".pth")
"""The endings of files that training frameworks pickle; the service refuses them by name."""
