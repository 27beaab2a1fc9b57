"""The client that a worker installs: it turns an adapter's id into `past_key_values`.

from prefix_service.client import PrefixClient

client = PrefixClient("http://prefix-service:8080", api_key=...)
prefix = client.get("acme/summarize@prod", batch_size=4, dtype="bfloat16")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from prefix_service.client.base_model_check import BaseModelWarning
from prefix_service.client.client import AsyncPrefixClient, PrefixClient
from prefix_service.client.flows.management import ServiceInfo
from prefix_service.client.flows.resolving import ResolvedVersion
from prefix_service.client.flows.watched import WatchedChange
from prefix_service.client.watch import Watch
from prefix_service.prefix.fingerprint import Fingerprint

if TYPE_CHECKING:
    from prefix_service.client.prefixes.mixed import MixedPrefix
    from prefix_service.client.prefixes.prefix import Prefix

__all__ = [
    "AsyncPrefixClient",
    "BaseModelWarning",
    "Fingerprint",
    "MixedPrefix",
    "Prefix",
    "PrefixClient",
    "ResolvedVersion",
    "ServiceInfo",
    "Watch",
    "WatchedChange",
]

_NEED_TORCH = {"MixedPrefix": "prefix_service.client.prefixes.mixed", "Prefix": "prefix_service.client.prefixes.prefix"}


def __getattr__(name: str) -> Any:
    """Returns `Prefix` or `MixedPrefix`; they import torch, which takes seconds, so they are imported on demand."""
    if name not in _NEED_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_NEED_TORCH[name]), name)
