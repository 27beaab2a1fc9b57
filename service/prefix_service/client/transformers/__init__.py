"""Prefixes in Hugging Face transformers: caches, generation, and compilation of prompts into prefixes."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prefix_service.client.transformers.compiling import CompiledPrefix, compile_prefix
    from prefix_service.client.transformers.fingerprints import fingerprint_of
    from prefix_service.client.transformers.texts import text_tokens

__all__ = ["CompiledPrefix", "compile_prefix", "fingerprint_of", "text_tokens"]

_MODULES = {
    "CompiledPrefix": "compiling",
    "compile_prefix": "compiling",
    "fingerprint_of": "fingerprints",
    "text_tokens": "texts",
}


def __getattr__(name: str) -> Any:
    """Returns what compiles; it imports torch and transformers, which takes seconds, so it is imported on demand."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
