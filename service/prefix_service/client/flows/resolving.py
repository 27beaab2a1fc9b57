"""Resolves a reference to its present version and the fingerprint of its base model, without tensors."""

from dataclasses import asdict, dataclass, replace

from prefix_service.client.flows import base_models, flows
from prefix_service.client.flows.flows import Reading
from prefix_service.client.protocol import Flow
from prefix_service.errors import PrefixServiceError
from prefix_service.prefix.fingerprint import NO_FINGERPRINT, Fingerprint
from prefix_service.prefix.variant import Identity, KVDtype
from prefix_service.prefix.wire.metadata import read_dtype, read_identity


@dataclass(frozen=True, slots=True)
class ResolvedVersion(Identity):
    """The version that a reference means, and the dimensions of its prefix; `dtype` is that of the stored weights.

    `base_model` is the fingerprint of its base model as it was within the last minute, without a field if none was
    given.
    """

    dtype: KVDtype
    base_model: Fingerprint = NO_FINGERPRINT

    @property
    def reference(self) -> str:
        """The version's immutable name, `tenant/adapter@sha256:…`."""
        return f"{self.tenant}/{self.adapter}@{self.digest}"


def resolve(reading: Reading, reference: str) -> Flow[ResolvedVersion]:
    """Returns the version that a reference means now.

    Raises:
        InvalidResponse: an answer does not describe a version or a base model, or describes another version.
    """
    found, has_base_model = yield from flows.described(reference)
    version = ResolvedVersion(**asdict(read_identity(found)), dtype=read_dtype(found))
    if not has_base_model:
        return version
    known = yield from base_models.recent(reading.fingerprints, version.reference)
    if isinstance(known, PrefixServiceError):
        raise known
    return replace(version, base_model=known)
