"""The names of an adapter's files: those that PEFT's `save_pretrained` writes, which uploads use too, and those that
`compile` adds."""

from typing import Final

CONFIG_NAME: Final = "adapter_config.json"
CARD_NAME: Final = "README.md"
WEIGHTS_NAME: Final = "adapter_model.safetensors"
RECIPE_NAME: Final = "prefix_recipe.json"
"""A JSON object of texts, which `publish` sends as annotations of the version."""
RECIPE_KEYS: Final = "compiled/"
"""How the keys of a recipe begin; other annotations are the publisher's own."""
BASE_MODEL_NAME: Final = "prefix_base_model.json"
"""The fingerprint of a compiled prefix's base model, which `publish` stores with the version."""

PICKLE_SUFFIXES: Final = (".bin", ".ckpt", ".pkl", ".pt", ".pth")
"""The endings of files that training frameworks pickle; the service refuses them by name."""
