"""What is stored of a version: its weights as they were uploaded, and the keys and values that were made of them."""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import BinaryIO, Final

import torch
from torch import Tensor

from service.blobs import Beside, BlobStore, Memory, read_range
from service.catalog.catalog import Catalog
from service.catalog.records import Version
from service.errors import CorruptBlob, NotFound, Unavailable
from service.prefix.buffers import bytes_of
from service.prefix.checkpoint import BLOCK, PrefixFile, ReadBytes, locate_prefix, read_rows, read_weights
from service.prefix.config import PrefixConfig, parse_config
from service.prefix.encoder import HIDDEN_BLOCK, PrefixEncoder, assemble
from service.prefix.kv import PrefixKV
from service.prefix.rendering import to_host
from service.prefix.safetensors_header import WEIGHT_DTYPES, header_of, parse_header, tensor_at
from service.prefix.streams import own_stream

log = logging.getLogger("prefix_service")

_KEY_VALUES: Final = "past_key_values"
_UNWATCHED: Final = contextlib.nullcontext[Beside | None](None)


class Encodings:
    """The encoder runs once in a version's life, on a device; what it gave is a derived blob. Blocking; `memory` is
    what blobs are best read into for that device."""

    def __init__(self, catalog: Catalog, blobs: BlobStore, device: torch.device, memory: Memory) -> None:
        self._catalog, self._blobs, self._device, self._memory = catalog, blobs, device, memory

    def encode(self, config: PrefixConfig, file: PrefixFile, read: ReadBytes) -> PrefixKV:
        """Returns the keys and values of a prefix in a weights file, in host memory.

        Raises:
            InvalidCheckpoint: a weight, or the result of an MLP, is not finite.
        """
        if not file.is_projected:
            return assemble(config, read_rows(file, read), file.dtype, torch.device("cpu"))
        with own_stream(self._device):
            kv = PrefixEncoder.from_weights(config, read_weights(file, read), self._device).encode()
            return replace(kv, tensor=to_host(kv.tensor))

    def store(self, kv: PrefixKV) -> str:
        """Keep them; the digest of the blob.

        Raises:
            OutOfSpace, StorageFailed: the disk refused.
        """
        staged = self._blobs.stage()
        try:
            staged.write(header_of(_KEY_VALUES, kv.tensor.dtype, kv.tensor.shape))
            staged.write(bytes_of(kv.tensor))
            return staged.commit()
        finally:
            staged.discard()

    def load(
        self, version: Version, watching: contextlib.AbstractContextManager[Beside | None] = _UNWATCHED
    ) -> PrefixKV:
        """Keys and values as they are stored, made anew where they are lost; what `watching` yields sees the blob's
        pieces as they come, and its block ends once they are verified.

        Raises:
            Unavailable: they were lost, and the version has another entity tag now.
            CorruptBlob, StorageFailed: the stored bytes cannot be read.
        """
        try:
            with watching as beside:
                data = self._blobs.read(version.key_values, self._memory, beside)
        except NotFound:
            return self._encode_again(version)
        return PrefixKV.whole(tensor_at(data, parse_header(data, dtypes=WEIGHT_DTYPES).tensors[_KEY_VALUES]))

    def _encode_again(self, version: Version) -> PrefixKV:
        """A derived blob that was lost is made anew from the weights; an MLP may give it other last bits."""
        about = {"version": f"{version.tenant}/{version.adapter}@{version.number}", "digest": version.key_values}
        log.warning("keys and values lost", extra=about)
        with self._weights(version) as (file, read):
            kv = self.encode(parse_config(version.config), file, read)
        if (digest := self.store(kv)) != version.key_values:
            self._catalog.set_key_values(version, digest)
            raise Unavailable("the version was encoded again, ask again for its new entity tag")
        return kv

    def rows(self, version: Version) -> Iterator[Tensor]:
        """Yields the prefix as PEFT saves it, some rows `[n, L * 2 * H * D]` at a time.

        Raises:
            CorruptBlob, StorageFailed: the stored bytes cannot be read.
        """
        config = parse_config(version.config)
        if config.num_transformer_submodules == 1:  # so an MLP does not run again
            kv = self.load(version)
            step = max(1, BLOCK // (kv.nbytes // kv.num_virtual_tokens))
            yield from (kv.flat(first, first + step) for first in range(0, kv.num_virtual_tokens, step))
            return
        # The layers of two submodules are served in another order, and not all.
        with self._weights(version) as (file, read):
            if file.is_projected:
                yield from PrefixEncoder.from_weights(config, read_weights(file, read), torch.device("cpu")).rows()
            else:
                yield from read_rows(file, read)

    def rows_nbytes(self, version: Version) -> int:
        """Returns the most bytes of memory that `rows` takes at a time, without a look into the stored bytes."""
        config = parse_config(version.config)
        block = max(BLOCK, version.key_values_bytes // config.num_virtual_tokens)
        if config.num_transformer_submodules == 1:
            return version.key_values_bytes + block
        # In float32 beside halves, the weights come three times; an MLP's result has the size of the keys and values.
        return 3 * version.weights_bytes + HIDDEN_BLOCK + version.key_values_bytes + block

    def open_weights(self, version: Version) -> BinaryIO:
        """The weights file, byte for byte as it was uploaded, verified; the caller closes it.

        Raises:
            CorruptBlob, StorageFailed: the stored bytes cannot be read.
        """
        with _expected(version.weights):
            return self._blobs.open(version.weights)

    @contextlib.contextmanager
    def _weights(self, version: Version) -> Iterator[tuple[PrefixFile, ReadBytes]]:
        with self.open_weights(version) as stored:
            read = partial(read_range, stored)
            yield locate_prefix(read, version.weights_bytes, parse_config(version.config)), read


@contextlib.contextmanager
def _expected(digest: str) -> Iterator[None]:
    """A blob that the catalog names and the store lacks is damage, not a missing resource."""
    try:
        yield
    except NotFound as error:
        raise CorruptBlob(f"the stored bytes of {digest} are lost", retry_after=60) from error
