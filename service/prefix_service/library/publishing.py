"""Makes versions: uploaded, untrained, or composed of others.

All memory is estimated from config and header, and reserved before it is allocated. Quotas are checked before the work,
and again in the transaction that adds the version.
"""

import contextlib
import hashlib
import logging
from collections.abc import AsyncIterator, Callable, Generator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final

import rfc8785
import torch
from anyio import CancelScope, to_thread
from torch import Tensor

from prefix_service.blobs.port import BlobStore, StagedBlob
from prefix_service.catalog.catalog import Catalog
from prefix_service.catalog.changes import Change, KeyRevoked, TenantDeleted
from prefix_service.catalog.records import NewVersion, Version
from prefix_service.catalog.threads import read_catalog, write_catalog
from prefix_service.errors import InvalidConfig, PrefixServiceError
from prefix_service.library.arrivals import Arrivals, Target, Upload
from prefix_service.library.encodings import Encodings
from prefix_service.prefix.buffers import bytes_of
from prefix_service.prefix.checkpoint import BLOCK, LocatedPrefix, header_nbytes, locate_prefix
from prefix_service.prefix.compose import composed_config
from prefix_service.prefix.config import PrefixConfig, PrefixTuningConfig, parse_config
from prefix_service.prefix.description import EMPTY, Description
from prefix_service.prefix.encoder import InitWeights, PrefixEncoder, encoding_nbytes, fresh_nbytes, hidden_nbytes
from prefix_service.prefix.json_text import MAX_CONFIG_BYTES
from prefix_service.prefix.safetensors_tensors import header_of
from prefix_service.prefix.wire.rendering import KV_DTYPES
from prefix_service.registry.admission import Admission
from prefix_service.system.turns import in_thread

log = logging.getLogger("prefix_service")

_PARSED: Final = 32  # bytes of memory that parsing takes per byte of a header, at most (measured: 27)
_LONGEST_NAME: Final = 1000  # characters of a base model's name, which listings show
_FLAT: Final = "prompt_embeddings"  # the tensor's name in files that PEFT saves


class Publisher:
    """Publishes versions, for callers that are already authorised.

    `most` bounds each size that follows from a config, in bytes. `mended` is called with a version that was published
    again, since that restores its blobs.
    """

    def __init__(
        self,
        catalog: Catalog,
        blobs: BlobStore,
        encodings: Encodings,
        admission: Admission,
        most: int,
        mended: Callable[[Version], object],
    ) -> None:
        self._catalog, self._blobs, self._encodings, self._admission = catalog, blobs, encodings, admission
        self._most, self._mended = most, mended
        self._arrivals = Arrivals()

    @contextlib.asynccontextmanager
    async def receiving(self, target: Target, nbytes: int) -> AsyncIterator[Upload]:
        """Begins a version of at least `nbytes` bytes before any of them arrives; the block writes the weights and
        publishes them. Weights that are not published by its end are removed.

        Raises:
            NotFound: there is no such tenant.
            QuotaExceeded: the tenant's quotas do not allow it.
            OutOfSpace, StorageFailed: the disk or the catalog refused.
        """
        look = partial(self._catalog.room, target.tenant, target.adapter, make_tenant=target.make_tenant)
        room = await read_catalog(look)
        with self._arrivals.begin(target.tenant, target.by, room, nbytes) as arrival:
            weights = await to_thread.run_sync(self._blobs.stage)
            try:
                yield Upload(target, weights, arrival)
            finally:
                await in_thread(weights.discard)

    def on_changes(self, changes: Sequence[Change]) -> None:
        """Refuse the rest of uploads whose key was revoked, or whose tenant was deleted. An upload that this misses is
        refused by the transaction that would publish it."""
        gone = {change.tenant for change in changes if isinstance(change, TenantDeleted)}
        revoked = {change.key_id for change in changes if isinstance(change, KeyRevoked)}
        if gone or revoked:
            self._arrivals.refuse(gone, revoked)

    async def publish(
        self, upload: Upload, config: PrefixConfig, description: Description = EMPTY
    ) -> tuple[Version, bool]:
        """Publishes weights that have arrived. Returns the version, and whether it is new.

        Publishing the same content again returns the existing version, with its own description. Nothing is visible if
        this raises.

        Raises:
            InvalidConfig, InvalidCheckpoint, UnsafeCheckpoint: the config or the weights are not acceptable.
            Unauthenticated: the caller has lost its authority.
            NotFound: there is no such tenant.
            QuotaExceeded: the tenant's quotas do not allow it.
            OutOfSpace, StorageFailed: the disk or the catalog refused, or the work takes too much memory.
            Overloaded: other work held the memory for too long.
        """
        target = upload.target
        file, draft = await self._drafted(upload, config)
        nbytes = draft.nbytes + description.nbytes
        if (existing := await in_thread(partial(self._find, target, draft.digest, nbytes, upload.weights))) is not None:
            self._mended(existing)
            return existing, False
        upload.arrival.hold(nbytes)
        try:
            async with self._admission.work(target.tenant, encoding_nbytes(config, file)) as work:
                new = await work.compute(self._storing(draft, config, file, upload))
            upload.arrival.end()  # ended before the transaction, which counts the bytes too
            add = partial(
                self._catalog.add_version,
                target.tenant,
                target.adapter,
                new,
                target.by,
                description=description,
                make_tenant=target.make_tenant,
            )
            version, is_new = await write_catalog(add)
        except BaseException:
            if upload.arrival.is_stored:
                await self._abandon(target, draft)
            raise
        if not is_new:
            self._mended(version)
        return version, is_new

    async def _drafted(self, upload: Upload, config: PrefixConfig) -> tuple[LocatedPrefix, NewVersion]:
        """Returns the position of the prefix in an upload, and its version, whose keys and values are yet to be stored.

        Raises:
            InvalidConfig, InvalidCheckpoint, UnsafeCheckpoint: the config or the weights are not acceptable.
            Overloaded: other work held the memory for too long.
        """
        tenant, weights, admission = upload.target.tenant, upload.weights, self._admission
        header = await to_thread.run_sync(header_nbytes, weights.read, weights.size)
        async with admission.work(tenant, _PARSED * header) as work:
            file = await work.run(partial(locate_prefix, weights.read, weights.size, config))
        key_values_bytes = _elements(config) * file.encoded_dtype.itemsize
        self._require_moderate(key_values_bytes)
        if file.is_projected:
            self._require_moderate(hidden_nbytes(config))
        manifest = await admission.run(tenant, partial(_manifest, config, weights.digest))
        return file, NewVersion(
            digest=f"sha256:{hashlib.sha256(manifest).hexdigest()}",
            manifest=manifest.decode(),
            base_model=config.base_model_name_or_path,
            weights=weights.digest,
            weights_bytes=weights.size,
            weights_dtype=next(name for name, dtype in KV_DTYPES.items() if dtype == file.dtype),
            key_values="",
            key_values_bytes=key_values_bytes,
        )

    async def _abandon(self, target: Target, draft: NewVersion) -> None:
        """Has the bytes of a refused or cancelled version counted until they are collected: otherwise a client that
        hangs up at the right moment would fill the disk.
        """
        if target.by.acts_on is None:
            return  # the tenant would have been made with the version
        nbytes = draft.weights_bytes + draft.key_values_bytes
        abandon = partial(self._catalog.abandon, target.by.acts_on, target.adapter, draft.digest, nbytes)
        try:
            with CancelScope(shield=True):
                await write_catalog(abandon)
        except PrefixServiceError as error:
            log.warning("abandoned bytes not counted: %s", error, extra={"tenant": target.tenant, "bytes": nbytes})

    def _find(self, target: Target, digest: str, nbytes: int, weights: StagedBlob) -> Version | None:
        """Returns the version if its content is known; raises QuotaExceeded if there is no room for it. Then nothing
        needs to be encoded.
        """
        tenant, adapter, makes = target.tenant, target.adapter, target.make_tenant
        existing = self._catalog.find(tenant, adapter, digest, nbytes, target.by, make_tenant=makes)
        if existing is not None:
            weights.commit()
        return existing

    def _storing(
        self, draft: NewVersion, config: PrefixConfig, file: LocatedPrefix, upload: Upload
    ) -> Generator[None, None, NewVersion]:
        kv = yield from self._encodings.encoding(config, file, upload.weights.read)
        key_values = yield from self._encodings.storing(kv, upload.weights.digest)
        upload.arrival.is_stored = True
        upload.weights.commit()
        return replace(draft, key_values=key_values)

    async def publish_fresh(
        self, target: Target, config: PrefixConfig, init: InitWeights, seed: int, description: Description = EMPTY
    ) -> tuple[Version, bool]:
        """Publishes an untrained prefix, whose weights are stored as PEFT would save them.

        Returns the version, and whether it is new.

        Raises:
            InvalidConfig: a dimension is missing, or the sizes exceed those of an upload.
            PrefixServiceError: any error of `publish`.
        """
        config.require_dimensions()
        trained = config.trainable_parameters or 0
        is_projected = isinstance(config, PrefixTuningConfig) and config.prefix_projection and not config.inference_mode
        nbytes = 4 * _elements(config)
        self._require_moderate(max(nbytes, 4 * trained if not config.inference_mode else 0))
        if is_projected:
            self._require_moderate(hidden_nbytes(config))
        # The digest of the weights is not known yet.
        manifest = await self._admission.run(target.tenant, partial(_manifest, config, ""))
        async with self.receiving(target, 2 * nbytes + len(manifest)) as upload:
            async with self._admission.work(target.tenant, fresh_nbytes(config)) as work:
                await work.compute(_writing_fresh(upload.weights, config, init, seed))
            return await self.publish(upload, config, description)

    async def publish_composed(
        self, target: Target, sources: Sequence[tuple[str, Version]], description: Description = EMPTY
    ) -> tuple[Version, bool]:
        """Publishes the concatenation of prefixes, whose weights are stored as PEFT would save them.

        `sources` are the versions in order, each with the name that the caller used. Returns the version, and whether
        it is new.

        Raises:
            InvalidRequest: the prefixes differ in a dimension or in their task.
            InvalidConfig: the concatenation exceeds the sizes of an upload.
            PrefixServiceError: any error of `publish`.
        """
        config, manifest = await self._admission.run(target.tenant, partial(_composed, sources))
        dtypes = {_stored_dtype(version) for _, version in sources}
        dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
        nbytes = _elements(config) * dtype.itemsize
        self._require_moderate(nbytes)
        async with self.receiving(target, 2 * nbytes + len(manifest)) as upload:
            header = header_of(_FLAT, dtype, (config.num_virtual_tokens, config.prefix_embedding_dim or 0))
            await to_thread.run_sync(upload.weights.write, header)
            for _, version in sources:
                async with self._admission.work(target.tenant, self._encodings.rows_nbytes(version)) as work:
                    await work.compute(self._writing_rows(upload.weights, version, dtype))
            return await self.publish(upload, config, description)

    def _writing_rows(self, weights: StagedBlob, version: Version, dtype: torch.dtype) -> Generator[None, None, None]:
        for rows in self._encodings.rows(version):
            yield from _writing(weights, rows.to(dtype))

    def _require_moderate(self, nbytes: int) -> None:
        """Raises InvalidConfig if a size is too large, before it is allocated:
        a small config can describe a huge prefix.
        """
        if nbytes > self._most:
            raise InvalidConfig(f"the config's sizes make {nbytes} bytes, more than {self._most}")


def _writing_fresh(
    weights: StagedBlob, config: PrefixConfig, init: InitWeights, seed: int
) -> Generator[None, None, None]:
    weights.write(header_of(_FLAT, torch.float32, (config.num_virtual_tokens, config.prefix_embedding_dim or 0)))
    encoder = yield from PrefixEncoder.drawing(config, init, seed, torch.device("cpu"))
    for rows in encoder.rows():
        yield from _writing(weights, rows)


def _writing(weights: StagedBlob, rows: Tensor) -> Generator[None, None, None]:
    """Writes rows, some megabytes per step, none of them in the step that computed the rows."""
    data = bytes_of(rows.contiguous())
    for first in range(0, len(data), BLOCK):
        yield
        weights.write(data[first : first + BLOCK])


def _composed(sources: Sequence[tuple[str, Version]]) -> tuple[PrefixConfig, bytes]:
    """Returns the config of a concatenation, and its manifest without a digest.

    The first config is kept whole; of the others, only the fields that the service reads.
    """
    (first, version), *others = sources
    config = composed_config(
        [(first, parse_config(version.config)), *((name, version.prefix_config) for name, version in others)]
    )
    return config, _manifest(config, "")


def _stored_dtype(version: Version) -> torch.dtype:
    """Returns the dtype of a version's keys and values: float32 if an MLP
    computed them from weights in half precision.
    """
    dtype = KV_DTYPES[version.weights_dtype]
    return dtype if version.key_values_bytes == _elements(version.prefix_config) * dtype.itemsize else torch.float32


def _elements(config: PrefixConfig) -> int:
    return config.num_virtual_tokens * (config.prefix_embedding_dim or 0)


def _manifest(config: PrefixConfig, weights: str) -> bytes:
    """Returns the canonical JSON (RFC 8785) of a version; its hash is the version's digest.

    Raises:
        InvalidConfig: the base model's name or the JSON is too long, or canonical JSON cannot hold a value.
    """
    name = config.base_model_name_or_path or ""
    if len(name) > _LONGEST_NAME:
        raise InvalidConfig(f"base_model_name_or_path has {len(name)} characters, more than {_LONGEST_NAME}")
    values: dict[str, Any] = {"format": 1, "config": config.model_dump(mode="json"), "weights": weights}
    try:
        manifest = rfc8785.dumps(values)
    except ValueError as error:  # also a lone surrogate in a key, which rfc8785 leaves to the codec
        raise InvalidConfig(f"the config cannot be written as canonical JSON (RFC 8785): {error}") from error
    if len(manifest) > MAX_CONFIG_BYTES:
        raise InvalidConfig(
            f"the config has {len(manifest)} bytes as canonical JSON (RFC 8785), more than {MAX_CONFIG_BYTES}: leave "
            "out what PEFT does not need"
        )
    return manifest
