"""Resolves a reference to its present version and the fingerprint of its base model, without tensors."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from prefix_service.client.flows import flows
from prefix_service.client.flows.flows import Reading
from prefix_service.client.protocol import Answer, Flow, Request, Together, adapter_path
from prefix_service.errors import InvalidRequest, InvalidResponse, NotFound, PrefixServiceError
from prefix_service.prefix.fingerprint import NO_FINGERPRINT, Fingerprint
from prefix_service.prefix.references import parse_qualified
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
    found = yield from flows.inspect(reference)
    version = ResolvedVersion(**asdict(read_identity(found)), dtype=read_dtype(found))
    known = reading.fingerprints.get(version.reference)
    if known is None:
        (read,) = yield Together([base_model(version.reference)], 1)
        if isinstance(read, PrefixServiceError) and not isinstance(read, NotFound):
            raise read
        known = NO_FINGERPRINT if isinstance(read, NotFound) else read  # an older service keeps none
        reading.fingerprints.put(version.reference, known)
    return replace(version, base_model=known)


def base_model(reference: str) -> Flow[Fingerprint]:
    """Returns the fingerprint of a version's base model, as it is now."""
    answer: Answer = yield Request("GET", _path(reference))
    try:
        return Fingerprint.of(answer.json_object())
    except InvalidRequest as error:
        raise InvalidResponse(f"the fingerprint of a base model is malformed: {error}") from error


def put_base_model(reading: Reading, reference: str, fingerprint: Mapping[str, Any]) -> Flow[None]:
    """Replace the fingerprint of a version's base model, and forget what was read of it."""
    yield Request("PUT", _path(reference), json=dict(fingerprint))
    reading.fingerprints.clear()


def _path(reference: str) -> str:
    return adapter_path(*parse_qualified(reference), "base-model")
