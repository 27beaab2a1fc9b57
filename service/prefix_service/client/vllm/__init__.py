"""Prefixes in stock vLLM, without a patch: a KV connector, and a middleware for vLLM's OpenAI-compatible server.

vLLM gets the names of the classes, and imports them itself (README.md in this folder):

    kv_transfer_config = {
        "kv_connector": "PrefixConnector",
        "kv_connector_module_path": "prefix_service.client.vllm",
        "kv_role": "kv_consumer",
        "kv_connector_extra_config": {"url": "http://prefix-service:8080"},
    }

A request then names its adapter: in the server as `"model": "acme/summarize@prod"`, in `LLM()` by
`SamplingParams(extra_args={"kv_transfer_params": {"prefix_adapter": "acme/summarize@prod"}})`.
"""

from typing import Any

__all__ = ["MultiConnector", "PrefixConnector", "PrefixMiddleware"]


def __getattr__(name: str) -> Any:
    """Returns a public class; the connectors import vLLM, so they are imported on demand.

    Raises:
        ImportError: vLLM is missing, or is not a version that this was built for.
    """
    if name == "PrefixConnector":
        from prefix_service.client.vllm.supported_versions import require_vllm

        require_vllm()
        from prefix_service.client.vllm.connector import PrefixConnector

        return PrefixConnector
    if name == "MultiConnector":
        from prefix_service.client.vllm.supported_versions import require_vllm

        require_vllm()
        from prefix_service.client.vllm.partners import MultiConnector

        return MultiConnector
    if name == "PrefixMiddleware":
        from prefix_service.client.vllm.middleware import PrefixMiddleware

        return PrefixMiddleware
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
