"""What a worker installs: a client that turns an adapter's id into `past_key_values`.

from service.client import PrefixClient

client = PrefixClient("http://prefix-service:8080", api_key=...)
prefix = client.get("acme/summarize@prod", batch_size=4, dtype="bfloat16")
"""

from service.client.client import AsyncPrefixClient, PrefixClient
from service.client.prefix import Prefix

__all__ = ["AsyncPrefixClient", "Prefix", "PrefixClient"]
