"""A worker's half: fetches this rank's layers and heads in threads, and writes them between two steps of the model."""

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final

import torch
from torch import Tensor

from service.client.client import PrefixClient
from service.client.prefix import Prefix
from service.client.vllm.model import Model
from service.client.vllm.scheduler import Load
from service.errors import InvalidRequest, PrefixServiceError
from service.prefix.form import Span

log = logging.getLogger("vllm.prefix_service")

_THREADS: Final = 8


class WorkerHalf:
    """Worker side of the connector. Its calls come from one thread, which alone writes to the cache: so no write meets
    a forward pass, on whatever stream it runs."""

    def __init__(self, client: PrefixClient, model: Model, kv_heads: Span, block_size: int) -> None:
        self._client, self._model, self._kv_heads, self._block_size = client, model, kv_heads, block_size
        self._threads = ThreadPoolExecutor(_THREADS, "prefix-loads")
        self._layers: dict[int, Any] = {}
        self._fetches: dict[str, Future[Prefix]] = {}
        self._loads: list[Load] = []

    def register(self, layers: Mapping[int, Any]) -> None:
        """The attention layers of this rank, by their number in the model.

        Raises:
            InvalidRequest: layers that prefixes cannot be written to.
        """
        first, last = min(layers), max(layers) + 1
        if set(layers) != set(range(first, last)):
            raise InvalidRequest(f"PrefixConnector needs attention in every layer, and found it in {sorted(layers)}")
        for number, layer in layers.items():
            if not hasattr(layer.impl, "do_kv_cache_update"):
                backend = type(layer.impl).__name__
                raise InvalidRequest(
                    f"the attention backend of layer {number}, {backend}, cannot write keys and values"
                )
        self._layers = dict(sorted(layers.items()))

    def start(self, loads: Sequence[Load]) -> None:
        """Begin to fetch what these loads need; one fetch for all who wait for the same version."""
        for load in loads:
            self._loads.append(load)
            if load.reference is not None and load.reference not in self._fetches:
                self._fetches[load.reference] = self._threads.submit(self._fetch, load.reference)

    def _fetch(self, reference: str) -> Prefix:
        layers = (min(self._layers), max(self._layers) + 1)
        return self._client.get(reference, dtype=self._model.dtype, layers=layers, kv_heads=self._kv_heads)

    def finish(self) -> tuple[set[str], set[str]]:
        """Write what has arrived: the requests that are done with, and those of them that failed."""
        done, failed = set[str](), set[str]()
        for load in self._loads:
            fetch = None if load.reference is None else self._fetches[load.reference]
            if fetch is not None and not fetch.done():
                continue
            done.add(load.request_id)
            try:
                if fetch is None:
                    failed.add(load.request_id)
                else:
                    self._write(load, fetch.result())
            except Exception as error:
                unexpected = None if isinstance(error, PrefixServiceError) else error
                log.error("request %s fails: %s: %s", load.request_id, load.reference, error, exc_info=unexpected)  # noqa: TRY400
                failed.add(load.request_id)
        self._loads = [load for load in self._loads if load.request_id not in done]
        waited_for = {load.reference for load in self._loads}
        self._fetches = {name: fetch for name, fetch in self._fetches.items() if name in waited_for}
        return done, failed

    def _write(self, load: Load, prefix: Prefix) -> None:
        """Into the blocks, by the backend's own writer: blocks have other layouts, and other dtypes, inside."""
        device = next(iter(self._layers.values())).kv_cache.device
        positions = torch.arange(load.start, load.end)
        blocks = torch.tensor(load.block_ids)
        slots = (blocks[positions // self._block_size] * self._block_size + positions % self._block_size).to(device)
        for layer, pair in zip(self._layers.values(), prefix.kv.tensor, strict=True):
            key, value = (_tokens_first(one, load, device) for one in pair)
            layer.impl.do_kv_cache_update(layer, key, value, layer.kv_cache, slots)

    def close(self) -> None:
        """End the threads and connections."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._client.close()


def _tokens_first(tensor: Tensor, load: Load, device: torch.device) -> Tensor:
    # (H', N, D) -> (end - start, H', D)
    return tensor[:, load.start : load.end].transpose(0, 1).to(device).contiguous()
