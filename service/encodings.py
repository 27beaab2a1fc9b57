"""What is stored of a version: its weights as they were uploaded, and the keys and values that were made of them."""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import BinaryIO, Final

import torch
from safetensors.torch import save
from torch import Tensor

from service.blobs import Beside, BlobStore, Memory
from service.catalog.catalog import Catalog
from service.catalog.records import Version
from service.errors import CorruptBlob, NotFound, Unavailable
from service.prefix.checkpoint import PrefixWeights, load_weights
from service.prefix.config import PrefixConfig, parse_config
from service.prefix.encoder import PrefixEncoder
from service.prefix.kv import PrefixKV
from service.prefix.rendering import to_host
from service.prefix.safetensors_header import WEIGHT_DTYPES, parse_header, tensor_at
from service.prefix.streams import own_stream

log = logging.getLogger("prefix_service")

_KEY_VALUES: Final = "past_key_values"
_UNWATCHED: Final = contextlib.nullcontext[Beside | None](None)


class Encodings:
    """The encoder runs once in a version's life, on a device; what it gave is a derived blob. Blocking; `memory` is
    what blobs are best read into for that device."""

    def __init__(self, catalog: Catalog, blobs: BlobStore, device: torch.device, memory: Memory) -> None:
        self._catalog, self._blobs, self._device, self._memory = catalog, blobs, device, memory

    def encode(self, config: PrefixConfig, weights: PrefixWeights) -> PrefixKV:
        """Keys and values of trained weights, in host memory."""
        with own_stream(self._device):
            kv = PrefixEncoder.from_weights(config, weights, self._device).encode()
            return replace(kv, tensor=to_host(kv.tensor))

    def store(self, kv: PrefixKV) -> str:
        """Keep them; the digest of the blob.

        Raises:
            OutOfSpace, StorageFailed: the disk refused.
        """
        staged = self._blobs.stage()
        try:
            staged.write(save({_KEY_VALUES: kv.tensor}))
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
        kv = self.encode(*self._weights(version))
        if (digest := self.store(kv)) != version.key_values:
            self._catalog.set_key_values(version, digest)
            raise Unavailable("the version was encoded again, ask again for its new entity tag")
        return kv

    def flat(self, version: Version) -> Tensor:
        """The prefix as PEFT saves it, `[N, L * 2 * H * D]`.

        Raises:
            CorruptBlob, StorageFailed: the stored bytes cannot be read.
        """
        config = parse_config(version.config)
        if config.num_transformer_submodules == 1:
            return self.load(version).flat()  # so an MLP does not run again
        # The layers of two submodules are served in another order, and not all.
        return PrefixEncoder.from_weights(*self._weights(version), torch.device("cpu")).flat()

    def open_weights(self, version: Version) -> BinaryIO:
        """The weights file, byte for byte as it was uploaded, verified; the caller closes it.

        Raises:
            CorruptBlob, StorageFailed: the stored bytes cannot be read.
        """
        with _expected(version.weights):
            return self._blobs.open(version.weights)

    def _weights(self, version: Version) -> tuple[PrefixConfig, PrefixWeights]:
        config = parse_config(version.config)
        with _expected(version.weights):
            return config, load_weights(self._blobs.read(version.weights), config)


@contextlib.contextmanager
def _expected(digest: str) -> Iterator[None]:
    """A blob that the catalog names and the store lacks is damage, not a missing resource."""
    try:
        yield
    except NotFound as error:
        raise CorruptBlob(f"the stored bytes of {digest} are lost", retry_after=60) from error
