"""What a worker installs: a client that turns an adapter's id into `past_key_values`.

from service.client import PrefixClient

client = PrefixClient("http://prefix-service:8080", api_key=...)
prefix = client.get("acme/summarize@prod", batch_size=4, dtype="bfloat16")
"""

from typing import TYPE_CHECKING, Any

from service.client.client import AsyncPrefixClient, PrefixClient

if TYPE_CHECKING:
    from service.client.prefix import Prefix

__all__ = ["AsyncPrefixClient", "Prefix", "PrefixClient"]


def __getattr__(name: str) -> Any:
    """`Prefix` brings torch, which takes seconds: only who asks for it waits."""
    if name != "Prefix":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from service.client.prefix import Prefix

    return Prefix
