"""The worker's half: fetches this rank's layers and heads in the background, and writes them between two steps of the
model.
"""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from prefix_service.client.vllm.background import Background, all_of
from prefix_service.client.vllm.model import Model
from prefix_service.client.vllm.requests import References
from prefix_service.client.vllm.shelf import Load, Orders, Reports
from prefix_service.client.vllm.source import Source
from prefix_service.errors import Internal, InvalidRequest, InvalidResponse, PrefixServiceError, TooLarge
from prefix_service.prefix.variant import Span

if TYPE_CHECKING:
    from prefix_service.client.prefixes.prefix import Prefix

log = logging.getLogger("vllm.prefix_service")

_NULL_BLOCK: Final = 0
"""The block that vLLM puts in place of blocks that a group does not keep (`BlockPool.null_block`)."""


@dataclass(frozen=True, slots=True)
class Layer:
    """An attention layer of vLLM with keys and values of its own; `group` is the group of blocks that holds them."""

    module: Any
    group: int
    block_size: int


@dataclass(frozen=True, slots=True)
class _Places:
    """The positions `start` to `end` of a prefix that a group of blocks keeps, and the slot of each."""

    start: int
    end: int
    slots: Tensor


class WorkerHalf:
    """The worker's side of the connector. One thread makes all calls, and no other writes
    to the cache, so no write overlaps a forward pass on any stream."""

    def __init__(self, source: Source, model: Model, kv_heads: Span, early_bytes: int) -> None:
        """Early fetches have at most `early_bytes` together."""
        self._source, self._model, self._kv_heads, self._early_bytes = source, model, kv_heads, early_bytes
        self._background = Background("prefix-bytes")
        self._layers: dict[int, Layer] = {}
        self._parcels: dict[int, Future[list[Prefix]]] = {}  # by number, arrived or on their way
        self._early: dict[int, Future[list[Prefix]]] = {}  # fetches whose versions are not known yet
        self._early_sizes: dict[int, dict[str, int]] = {}  # bytes of each reference, by the number of the fetch
        self._unreported: set[int] = set()
        self._loads: list[tuple[Load, Future[list[Prefix]] | None]] = []
        self._unwritten: dict[str, PrefixServiceError] = {}  # requests whose prefixes the last step did not write

    def register(self, layers: Mapping[int, Layer]) -> None:
        """Registers the attention layers of this rank, by their number in the model.

        Raises:
            InvalidRequest: prefixes cannot be written to these layers.
        """
        first, last = min(layers), max(layers) + 1
        if set(layers) != set(range(first, last)):
            raise InvalidRequest(f"PrefixConnector needs attention in every layer, and found it in {sorted(layers)}")
        for number, layer in layers.items():
            if not hasattr(layer.module.impl, "do_kv_cache_update"):
                backend = type(layer.module.impl).__name__
                raise InvalidRequest(
                    f"the attention backend of layer {number}, {backend}, cannot write keys and values"
                )
            self._check_shape(number, layer.module)
        self._layers = dict(sorted(layers.items()))

    def _check_shape(self, number: int, module: Any) -> None:
        own = module.num_kv_heads, module.head_size
        expected = self._kv_heads[1] - self._kv_heads[0], self._model.head_dim
        if own != expected and (not self._model.layers_differ or own[0] > expected[0] or own[1] > expected[1]):
            raise InvalidRequest(
                f"layer {number} of this rank has {own[0]} key/value heads of size {own[1]}, and the model's "
                f"configuration {expected[0]} of size {expected[1]}: prefixes would not fit"
            )

    def start(self, orders: Orders) -> None:
        """Begins the scheduler's orders."""
        for load in orders.loads:
            self._loads.append((load, None if load.parcel is None else self._parcels.get(load.parcel)))
        for number in orders.drops:
            self._unreported.discard(number)
            parcel = self._parcels.pop(number, None)
            if parcel is not None:
                parcel.cancel()
        for number, references, early in orders.fetches:
            begun = None if early is None else self._take_early(early)
            self._parcels[number] = self._background.submit(self._fetch_or_take(references, begun))
            self._unreported.add(number)
        for number, references in orders.early:
            self._early_sizes[number] = {}
            self._early[number] = self._background.submit(self._fetch(references, number))
        for number in orders.given_up:
            if (begun := self._take_early(number)) is not None:
                begun.cancel()

    def _take_early(self, number: int) -> "Future[list[Prefix]] | None":
        self._early_sizes.pop(number, None)
        return self._early.pop(number, None)

    async def _fetch_or_take(self, references: References, begun: "Future[list[Prefix]] | None") -> "list[Prefix]":
        """Returns the prefixes of versions: those of a fetch that began early, if it was right, else fetched."""
        if begun is not None:
            with suppress(PrefixServiceError):
                prefixes = await asyncio.wrap_future(begun)
                if all(map(_is_of, prefixes, references)):
                    return prefixes
            del begun  # its error refers to this frame: the memory would stay until garbage is collected
        return await self._fetch(references)

    async def _fetch(self, references: References, early: int | None = None) -> "list[Prefix]":
        layers = (min(self._layers), max(self._layers) + 1)
        options: dict[str, Any] = {"dtype": self._model.dtype, "layers": layers, "kv_heads": self._kv_heads}
        if early is not None:
            # The first piece names the size: most of the memory for the body has not been touched yet.
            return await all_of(
                self._get(reference, **options, progress=partial(self._require_room, early, reference))
                for reference in references
            )
        return await all_of(self._get(reference, **options) for reference in references)

    async def _get(self, reference: str, **options: Any) -> "Prefix":
        """Returns a prefix, whose own metadata must fit the model as what the service said of its version did."""
        prefix = await self._source.get(reference, **options)
        self._model.check(prefix.metadata)
        return prefix

    def _require_room(self, number: int, reference: str, _arrived: int, total: int) -> None:
        """Notes the size of a prefix that is fetched early.

        Raises:
            TooLarge: early fetches would have too many bytes together.
        """
        if (sizes := self._early_sizes.get(number)) is None or reference in sizes:
            return  # it is a parcel's by now, whose bytes the scheduler counts, or it is noted
        if sum(sum(others.values()) for others in list(self._early_sizes.values())) + total > self._early_bytes:
            raise TooLarge(f"{reference} has {total} bytes, for which early fetches have no room")
        sizes[reference] = total

    def reports(self) -> Reports:
        """Returns the parcels that arrived or failed since the last step, and what this step did not write."""
        reports = Reports(unwritten=dict(self._unwritten))
        for number in [number for number in self._unreported if self._parcels[number].done()]:
            self._unreported.remove(number)
            error = self._parcels[number].exception()
            if error is None:
                reports.arrived[number] = 1
            else:
                if not isinstance(error, PrefixServiceError):
                    log.error("the bytes of a prefix cannot be had", exc_info=error)
                reports.failed[number] = _reason(error)
        return reports

    def finish(self) -> tuple[set[str], set[str]]:
        """Writes the prefixes that this step loads; returns the requests that are done, and which of them failed.

        A request whose prefixes cannot be written fails in the next step: vLLM ends requests that failed in a step
        before it passes the step's reports on, and the scheduler's half must have the reason by then.
        """
        loads, self._loads = self._loads, []
        failed = set(self._unwritten)
        self._unwritten = {}
        done = set(failed)
        for load, parcel in loads:
            try:
                if parcel is None:
                    failed.add(load.request_id)
                else:
                    self._write(load, parcel.result(timeout=0))
                done.add(load.request_id)
            except (Exception, asyncio.CancelledError) as error:
                log.error("request %s fails", load.request_id, exc_info=error)  # noqa: TRY400
                self._unwritten[load.request_id] = _reason(error)
        return done, failed

    def _write(self, load: Load, prefixes: "Sequence[Prefix]") -> None:
        """Writes prefixes into a request's blocks.

        The attention backend's own writer knows their layout and dtype. A layer with a window keeps the blocks that the
        window reaches alone; the prefix is written to all of each, since other requests may take over whole blocks.

        Raises:
            InvalidResponse: the prefixes are not as long as the service named them.
        """
        length = sum(prefix.kv.tensor.shape[-2] for prefix in prefixes)
        if length != load.end:
            raise InvalidResponse(f"the prefixes have {length} virtual tokens, and the service named {load.end}")
        groups = {layer.group: layer.block_size for layer in self._layers.values()}
        places = {group: _places(load, load.block_ids[group], size) for group, size in groups.items()}
        tensors = [prefix.kv.tensor for prefix in prefixes]
        for layer, *parts in zip(self._layers.values(), *tensors, strict=True):
            place, module = places[layer.group], layer.module
            if place.start < place.end:
                device = module.kv_cache.device
                pair = parts[0] if len(parts) == 1 else torch.cat(parts, -2)  # (2, H', N, D)
                narrow = pair[:, : module.num_kv_heads, place.start : place.end, : module.head_size]
                key, value = (_tokens_first(one, device) for one in narrow)
                if self._model.evens_first:
                    key = torch.cat((key[..., 0::2], key[..., 1::2]), -1)
                module.impl.do_kv_cache_update(module, key, value, module.kv_cache, place.slots.to(device))

    def close(self) -> None:
        """Ends the thread and the connections."""
        self._background.close(self._source.close)


def _reason(error: BaseException) -> PrefixServiceError:
    """Returns an error as one that can be sent to the scheduler and to a caller."""
    if isinstance(error, PrefixServiceError):
        return error
    return Internal(f"an unexpected error in a worker: {error!r:.200}")


def _is_of(prefix: "Prefix", reference: str) -> bool:
    """Returns whether a prefix is that of an immutable reference."""
    return f"{prefix.metadata['tenant']}/{prefix.metadata['adapter']}@{prefix.digest}" == reference


def _places(load: Load, block_ids: Sequence[int], block_size: int) -> _Places:
    """Returns where a group of blocks keeps the positions of a load: from some position on, or nowhere."""
    positions = torch.arange(load.start, load.end)
    blocks = torch.full((-(-load.end // block_size),), _NULL_BLOCK)
    given = torch.tensor(block_ids[: len(blocks)], dtype=blocks.dtype)
    blocks[: len(given)] = given
    kept = positions[blocks[positions // block_size] != _NULL_BLOCK]
    start = int(kept[0]) if len(kept) else load.end
    return _Places(start, start + len(kept), blocks[kept // block_size] * block_size + kept % block_size)


def _tokens_first(tensor: Tensor, device: torch.device) -> Tensor:
    # (H', N, D) -> (N, H', D)
    return tensor.transpose(0, 1).to(device).contiguous()
