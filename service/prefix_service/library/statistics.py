"""Figures of versions: the norms of keys and values, and how far two versions are apart."""

from collections.abc import Callable, Generator
from dataclasses import asdict
from functools import partial
from typing import Any, Final

import orjson
from torch import Tensor

from prefix_service.catalog.records import Version
from prefix_service.errors import CorruptBlob
from prefix_service.library.encodings import Encodings
from prefix_service.library.in_parallel import InParallel
from prefix_service.prefix.bins import Bins, Shape
from prefix_service.prefix.comparison import (
    comparing,
    comparing_nbytes,
    cosine,
    layer_differences,
    relative,
    require_same_shape,
    together,
)
from prefix_service.prefix.json_text import json_memory
from prefix_service.prefix.norms import Norms, measuring, measuring_nbytes
from prefix_service.registry.admission import Admission
from prefix_service.system.shares import Shares

_MOST_KEPT: Final = 32 << 20  # bytes of documents
_MOST_DOCUMENT: Final = 4 << 20  # bytes that a document and its numbers take while it is written

_Key = tuple[str, ...]
_Steps = Callable[..., Generator[None, None, bytes]]


class VersionStatistics:
    """Computes figures once for a version, or for a pair of versions, and keeps them as JSON documents.

    A version never changes, so a document is valid as long as it is kept; tenants do not displace each other's equal
    share. Computations run in the turns of the tenant that owns the versions. They read the stored keys and values in
    parts, outside of the memory in which prefixes are resident: they neither load nor evict a version. Used from one
    event loop.
    """

    def __init__(self, encodings: Encodings, admission: Admission) -> None:
        self._encodings, self._admission = encodings, admission
        self._known: Shares[_Key, bytes] = Shares(_MOST_KEPT)
        self._computing: InParallel[_Key, bytes] = InParallel()

    async def norms(self, version: Version) -> bytes:
        """Returns the norms of keys and values as JSON.

        Raises:
            NotFound: the version was deleted meanwhile.
            CorruptBlob, StorageFailed: the stored tensors cannot be read.
            OutOfSpace, Unavailable, Overloaded: the memory budget does not allow it now.
        """
        return await self._document((version,), measuring_nbytes(_shape(version)), self._measuring)

    async def comparison(self, first: Version, second: Version) -> bytes:
        """Returns how far two versions of one tenant are apart, and which fields of their configs differ, as JSON.

        Raises:
            InvalidRequest: they differ in layers, heads, tokens or head size.
            NotFound: a version was deleted meanwhile.
            CorruptBlob, StorageFailed: the stored tensors cannot be read.
            OutOfSpace, Unavailable, Overloaded: the memory budget does not allow it now.
        """
        require_same_shape(_shape(first), _shape(second))
        configs = json_memory(first.manifest_bytes + second.manifest_bytes)
        return await self._document((first, second), comparing_nbytes(_shape(first)) + configs, self._comparing)

    async def _document(self, versions: tuple[Version, ...], nbytes: int, steps: _Steps) -> bytes:
        """Returns the document of some versions, from memory, or computed now with so many bytes of memory."""
        tenant = versions[0].tenant
        key = tenant, *(part for one in versions for part in (one.adapter, str(one.number), one.digest, one.key_values))
        if (found := self._known.get(key)) is not None:
            return found

        async def compute() -> bytes:
            made = await self._computed(tenant, versions, nbytes + _MOST_DOCUMENT, steps)
            self._known.put(tenant, key, made, len(made))
            return made

        return await self._computing.result(key, compute)

    async def _computed(self, tenant: str, versions: tuple[Version, ...], nbytes: int, steps: _Steps) -> bytes:
        try:
            async with self._admission.work(tenant, nbytes) as work:
                return await work.compute(steps(*versions))
        except CorruptBlob:
            mended = [await self._mended(version) for version in versions]
        async with self._admission.work(tenant, nbytes) as work:
            return await work.compute(steps(*mended))

    async def _mended(self, version: Version) -> Version:
        """Returns a version whose keys and values can be read: encodes them again if they cannot."""
        try:
            async with self._admission.work(version.tenant, 0) as work:
                await work.run(partial(self._look, version))
        except CorruptBlob:
            nbytes = self._encodings.rows_nbytes(version) + 3 * version.weights_bytes
            async with self._admission.work(version.tenant, nbytes) as work:
                return await work.run(partial(self._encodings.mend, version))
        return version

    def _look(self, version: Version) -> None:
        with self._encodings.open_key_values(version):
            pass

    def _measuring(self, version: Version) -> Generator[None, None, bytes]:
        with self._encodings.open_key_values(version) as rows:
            norms = yield from measuring(_shape(version), rows)
        return orjson.dumps(_norms(norms))

    def _comparing(self, first: Version, second: Version) -> Generator[None, None, bytes]:
        with self._encodings.open_key_values(first) as one, self._encodings.open_key_values(second) as other:
            sums = yield from comparing(_shape(first), one, other)
        return orjson.dumps(_comparison(first, second, sums))


def _shape(version: Version) -> Shape:
    config = version.prefix_config
    return Shape(
        config.num_layers or 0, config.num_attention_heads or 0, config.num_virtual_tokens, config.head_dim or 0
    )


def _norms(norms: Norms) -> dict[str, Any]:
    by_head, by_token = _written(norms.by_head), _written(norms.by_token)
    return {
        "layers": asdict(norms.layers),
        "kv_heads": asdict(norms.kv_heads),
        "tokens": asdict(norms.tokens),
        "keys": {"by_head": by_head[0], "by_token": by_token[0]},
        "values": {"by_head": by_head[1], "by_token": by_token[1]},
        "sink_like": {
            "by_token": norms.sink_like.tolist(),
            "tokens": [{"token": token, "layers": layers} for token, layers in norms.sink_like_tokens],
        },
    }


def _comparison(first: Version, second: Version, sums: Tensor) -> dict[str, Any]:
    layers = Bins.of_layers(sums.shape[0])
    heads = layers.beside(sums.shape[2])
    cells = together(together(sums, layers, 0), heads, 2).movedim(1, 0)
    tables = {"relative": _written(relative(cells)), "cosine": _written(cosine(cells))}
    return {
        "first": _named(first),
        "second": _named(second),
        "config": _changed(first.config, second.config),
        "layers": asdict(layers),
        "kv_heads": asdict(heads),
        "keys": {name: table[0] for name, table in tables.items()},
        "values": {name: table[1] for name, table in tables.items()},
        "by_layer": [asdict(layer) for layer in layer_differences(sums, layers)],
    }


def _named(version: Version) -> dict[str, Any]:
    return {"adapter": version.adapter, "version": version.number, "digest": version.digest}


def _changed(first: dict[str, Any], second: dict[str, Any]) -> dict[str, list[Any]]:
    names = sorted({*first, *second})
    return {name: [first.get(name), second.get(name)] for name in names if first.get(name) != second.get(name)}


def _written(table: Tensor) -> list[Any]:
    """Returns a table as nested lists of numbers with seven significant digits."""
    return [_written(row) if row.dim() else float(f"{float(row):.7g}") for row in table]
