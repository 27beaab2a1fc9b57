"""A data set whose items are read from the service, as by a training job's workers, and numbered adapters."""

import asyncio
import io
from collections.abc import Iterator
from typing import Any, Final

import torch
from safetensors.torch import save
from torch.utils.data import Dataset

from prefix_service.client import AsyncPrefixClient, PrefixClient

ADAPTERS: Final = 6


def publish_numbered(client: PrefixClient, tenant: str) -> None:
    """Publishes adapters of which every key and value is the adapter's own number."""
    from tests.client.conftest import LLAMA  # imports for many seconds, which torch's workers need not wait for

    config = (LLAMA / "adapter_config.json").read_bytes()
    for number in range(ADAPTERS):
        weights = save({"prompt_embeddings": torch.full((20, 3 * 2 * 2 * 8), float(number))})
        client.publish_files(f"{tenant}/a{number}", config, io.BytesIO(weights))


def numbers_in(prefix: Any) -> list[float]:
    """Returns the different values of a prefix."""
    return [float(value) for value in prefix.kv.tensor.unique()]


class Reads(Dataset[tuple[int, list[float]]]):
    """Each item is the number of an adapter, and the values that were read for it."""

    def __init__(self, client: PrefixClient | AsyncPrefixClient, tenant: str, length: int = 64) -> None:
        self._client, self._tenant, self._length = client, tenant, length

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[tuple[int, list[float]]]:
        return map(self.__getitem__, range(self._length))

    def __getitem__(self, index: int) -> tuple[int, list[float]]:
        number = index * 5 % ADAPTERS
        reference = f"{self._tenant}/a{number}"
        if isinstance(self._client, AsyncPrefixClient):
            return number, numbers_in(asyncio.run(self._client.get(reference)))
        return number, numbers_in(self._client.get(reference))
