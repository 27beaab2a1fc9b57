"""The stored data of a version: its weights as uploaded, and the keys and values that were computed from them."""

import contextlib
import hashlib
import logging
import os
import time
from collections.abc import Generator, Iterator
from dataclasses import replace
from functools import partial
from math import prod
from typing import BinaryIO, Final, TypeVar

import torch
from torch import Tensor

from prefix_service.blobs.port import Allocate, BlobStore, ChunkObserver
from prefix_service.blobs.reading import read_range
from prefix_service.catalog.catalog import Catalog
from prefix_service.catalog.records import Version
from prefix_service.errors import CorruptBlob, NotFound, OutOfSpace, ReadOnly, Unavailable
from prefix_service.prefix.bins import Rows
from prefix_service.prefix.buffers import bytes_of
from prefix_service.prefix.checkpoint import (
    BLOCK,
    LocatedPrefix,
    ReadBytes,
    header_nbytes,
    locate_prefix,
    read_rows,
    read_weights,
)
from prefix_service.prefix.config import PrefixConfig
from prefix_service.prefix.encoder import HIDDEN_BLOCK, PrefixEncoder, assembling, finished
from prefix_service.prefix.kv import PrefixKV
from prefix_service.prefix.references import parse_reference
from prefix_service.prefix.safetensors_header import WEIGHT_DTYPES, TensorEntry, parse_header
from prefix_service.prefix.safetensors_tensors import header_of, tensor_at
from prefix_service.prefix.streams import own_stream
from prefix_service.prefix.wire.rendering import to_host

log = logging.getLogger("prefix_service")

T = TypeVar("T")
_KEY_VALUES: Final = "past_key_values"
_REMOVAL: Final = 5.0  # seconds; a collector takes less for what it removes together
_POLL: Final = 0.05  # seconds
_UNOBSERVED: Final = contextlib.nullcontext[ChunkObserver | None](None)


class EncodedAgain(Exception):
    """The stored keys and values are lost, and others with different bits replaced them.

    `version` is the same version with its new blob. Everything that was planned for the old bits, above all the entity
    tag, must be planned again.
    """

    def __init__(self, version: Version) -> None:
        super().__init__(f"{version} was encoded again")
        self.version = version


class Encodings:
    """Stored weights, and the keys and values that the encoder computes from them once in a version's life.

    All methods block. The encoder runs on `device`; `allocate` returns the host memory that suits copies to it.
    """

    def __init__(self, catalog: Catalog, blobs: BlobStore, device: torch.device, allocate: Allocate) -> None:
        self._catalog, self._blobs, self._device, self._allocate = catalog, blobs, device, allocate

    def encoding(self, config: PrefixConfig, file: LocatedPrefix, read: ReadBytes) -> Generator[None, None, PrefixKV]:
        """Returns the keys and values of a prefix in a weights file, in host memory.

        The first step reads an MLP's weights, each further step encodes one block of rows. Each step may run in another
        thread.

        Raises:
            InvalidCheckpoint: a weight, or the result of an MLP, is not finite.
        """
        if not file.is_projected:
            return (yield from assembling(config, read_rows(file, read), file.dtype, torch.device("cpu")))
        with own_stream(self._device):
            encoder = PrefixEncoder.from_weights(config, read_weights(file, read), self._device)
        yield
        kv = yield from _on_own_stream(self._device, encoder.encoding())
        with own_stream(self._device):
            host = to_host(kv.tensor)
        return replace(kv, tensor=host)

    def storing(self, kv: PrefixKV, *others: str) -> Generator[None, None, str]:
        """Stores keys and values, some megabytes per step; returns the digest of the blob. It is held in the catalog
        for the version that will name it, with the digests of other blobs that are about to be stored.

        Raises:
            OutOfSpace, StorageFailed: the disk or the catalog refused.
            Unavailable: another process is removing the same bytes.
            ReadOnly: the blob store only reads.
        """
        staged = self._blobs.stage()
        try:
            for piece in _pieces(kv):
                for first in range(0, len(piece), BLOCK):
                    staged.write(piece[first : first + BLOCK])
                    yield
            yield from self._holding((staged.digest, *others))
            return staged.commit()
        finally:
            staged.discard()

    def _holding(self, digests: tuple[str, ...]) -> Generator[None, None, None]:
        """Holds digests, and waits for a collector that is removing one of their blobs, for a moment per step.

        Raises:
            Unavailable: it takes too long.
            OutOfSpace, StorageFailed: the catalog refused.
        """
        until = time.monotonic() + _REMOVAL
        while not self._catalog.hold(digests):
            if time.monotonic() >= until:
                raise Unavailable("another process is removing the same bytes: try again in a moment", retry_after=10)
            time.sleep(_POLL)
            yield

    def load(
        self, version: Version, observing: contextlib.AbstractContextManager[ChunkObserver | None] = _UNOBSERVED
    ) -> PrefixKV:
        """Returns the stored keys and values; encodes them again from the weights if their blob is lost or damaged.

        `observing` is entered for the read; the observer that it yields receives the chunks.

        Raises:
            EncodedAgain: the new bits differ from the old ones, or another process has replaced the blob.
            NotFound: the version was deleted during the read.
            CorruptBlob: the weights are lost or damaged too.
            Unavailable, StorageFailed, OutOfSpace: the blob store or the catalog cannot be used now.
        """
        try:
            with observing as observer:
                data = self._blobs.read(version.key_values, self._allocate, observer)
        except (NotFound, CorruptBlob):
            return self._encode_again(version)
        return PrefixKV.whole(tensor_at(data, parse_header(data, dtypes=WEIGHT_DTYPES).tensors[_KEY_VALUES]))

    def load_current(self, version: Version) -> PrefixKV:
        """Returns the stored keys and values, or those that replaced them.

        Raises:
            NotFound: the version was deleted during the read.
            CorruptBlob: the weights are lost or damaged too.
            Unavailable, StorageFailed, OutOfSpace: the blob store or the catalog cannot be used now.
        """
        try:
            return self.load(version)
        except EncodedAgain as again:
            try:
                return self.load(again.version)
            except EncodedAgain as repeated:
                raise unstable(repeated) from repeated

    def _encode_again(self, version: Version) -> PrefixKV:
        name = str(version)
        current = self._catalog.resolve(version.tenant, parse_reference(f"{version.adapter}@{version.number}"))
        if current.key_values != version.key_values:
            raise EncodedAgain(current)
        log.warning("keys and values lost", extra={"version": name, "digest": version.key_values})
        with self._weights(version) as (file, read):
            kv = finished(self.encoding(version.prefix_config, file, read))
        sha256 = hashlib.sha256()
        for piece in _pieces(kv):
            sha256.update(piece)
        digest = f"sha256:{sha256.hexdigest()}"
        if digest == version.key_values:
            # The bytes are identical, so they can be served whether or not the disk takes them.
            try:
                finished(self.storing(kv))
            except (OutOfSpace, Unavailable, ReadOnly) as error:
                log.warning("keys and values are lost, and cannot be stored again: %s", error, extra={"version": name})
            return kv
        # An MLP can give other last bits on another processor.
        try:
            finished(self.storing(kv))
            raise EncodedAgain(self._catalog.replace_key_values(version, digest))
        except ReadOnly as error:
            raise CorruptBlob(
                f"the stored keys and values of {name} are lost, and this service is read-only: read them once from "
                "the service that writes, which encodes them again",
                retry_after=60,
            ) from error

    def rows(self, version: Version) -> Iterator[Tensor]:
        """Yields the prefix as PEFT saves it, some rows `[n, L * 2 * H * D]` at a time.

        Raises:
            NotFound: the version was deleted during the read.
            CorruptBlob, StorageFailed: the stored bytes cannot be read.
        """
        config = version.prefix_config
        if config.num_transformer_submodules == 1:  # so an MLP does not run again
            kv = self.load_current(version)
            step = max(1, BLOCK // (kv.nbytes // kv.num_virtual_tokens))
            yield from (kv.flat(first, first + step) for first in range(0, kv.num_virtual_tokens, step))
            return
        # With two submodules, keys and values have another order of layers than the weights, and lack some.
        with self._weights(version) as (file, read):
            if file.is_projected:
                yield from PrefixEncoder.from_weights(config, read_weights(file, read), torch.device("cpu")).rows()
            else:
                yield from read_rows(file, read)

    def rows_nbytes(self, version: Version) -> int:
        """Returns the most bytes of memory that `rows` takes; estimated without reading the stored bytes."""
        config = version.prefix_config
        block = max(BLOCK, version.key_values_bytes // config.num_virtual_tokens)
        if config.num_transformer_submodules == 1:
            return version.key_values_bytes + block
        # For weights in half precision, weights and their float32 copy are three times their size; an MLP's result has
        # the size of the keys and values.
        return 3 * version.weights_bytes + HIDDEN_BLOCK + version.key_values_bytes + block

    def open_weights(self, version: Version) -> BinaryIO:
        """Returns the weights file, byte for byte as it was uploaded, verified. The caller closes it.

        Raises:
            CorruptBlob, StorageFailed: the stored bytes cannot be read.
        """
        with _expected(version.weights):
            return self._blobs.open(version.weights)

    @contextlib.contextmanager
    def open_key_values(self, version: Version) -> Iterator[Rows]:
        """Yields a reader of the stored keys and values, verified, for versions of which a part is needed at a time.

        Raises:
            CorruptBlob: they are lost or damaged; `mend` encodes them again.
            Unavailable, StorageFailed: the blob store cannot be used now.
        """
        with _expected(version.key_values):
            stored = self._blobs.open(version.key_values)
        with stored:
            size = os.fstat(stored.fileno()).st_size
            read = partial(read_range, stored)
            header = parse_header(read(0, min(size, 8 + header_nbytes(read, size))), dtypes=WEIGHT_DTYPES, size=size)
            entry = header.tensors[_KEY_VALUES]
            row = (entry.stop - entry.start) // prod(entry.shape[:3])

            def rows(first: int, last: int) -> Tensor:
                data = read(entry.start + first * row, entry.start + last * row)
                part = TensorEntry(entry.dtype, (last - first, *entry.shape[3:]), 0, len(data))
                return tensor_at(data, part)

            yield rows

    def mend(self, version: Version) -> Version:
        """Encodes keys and values again whose blob is lost or damaged, and stores them; returns the version, with
        another blob if their bits differ.

        Raises:
            NotFound: the version was deleted meanwhile.
            CorruptBlob: the weights are lost or damaged too.
            Unavailable, StorageFailed, OutOfSpace: the blob store or the catalog cannot be used now.
        """
        try:
            self._encode_again(version)
        except EncodedAgain as again:
            return again.version
        return version

    @contextlib.contextmanager
    def _weights(self, version: Version) -> Iterator[tuple[LocatedPrefix, ReadBytes]]:
        with self.open_weights(version) as stored:
            read = partial(read_range, stored)
            yield locate_prefix(read, version.weights_bytes, version.prefix_config), read


def _on_own_stream(device: torch.device, steps: Generator[None, None, T]) -> Generator[None, None, T]:
    """Runs each step of a generator in inference mode, on a stream of the thread that takes the step.

    Streams and inference mode belong to threads.
    """
    while True:
        with own_stream(device), torch.inference_mode():
            try:
                next(steps)
            except StopIteration as end:
                value: T = end.value
                return value
        yield


def unstable(again: EncodedAgain) -> Unavailable:
    """Returns the error for a version whose keys and values were lost twice during one request."""
    return Unavailable(f"{again}, twice during this request: look at the disk of the blob folder, and try again")


def _pieces(kv: PrefixKV) -> tuple[bytes, memoryview]:
    """Returns the safetensors file in which keys and values are stored, as header and data, without a copy."""
    return header_of(_KEY_VALUES, kv.tensor.dtype, kv.tensor.shape), bytes_of(kv.tensor)


@contextlib.contextmanager
def _expected(digest: str) -> Iterator[None]:
    """Raises CorruptBlob for a blob that is missing: the catalog names it,
    so this is damage and not a missing resource.
    """
    try:
        yield
    except NotFound as error:
        raise CorruptBlob(f"the stored bytes of {digest} are lost", retry_after=60) from error
