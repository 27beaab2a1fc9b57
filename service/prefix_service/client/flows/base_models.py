"""Reads, remembers and replaces the fingerprints of versions' base models."""

from collections.abc import Mapping
from typing import Any

from prefix_service.client.cache.fingerprints import Fingerprints
from prefix_service.client.protocol import Answer, Flow, Request, Together, adapter_path
from prefix_service.errors import InvalidRequest, InvalidResponse, NotFound, PrefixServiceError
from prefix_service.prefix.fingerprint import NO_FINGERPRINT, Fingerprint
from prefix_service.prefix.references import parse_qualified


def recent(known: Fingerprints, version: str) -> Flow[Fingerprint | PrefixServiceError]:
    """Returns the fingerprint of a version's base model as it was within the last minute, by the version's immutable
    name; or the error with which the service answered. An older service keeps none."""
    found = known.get(version)
    if found is not None:
        return found
    (read,) = yield Together([base_model(version)], 1)
    if isinstance(read, PrefixServiceError) and not isinstance(read, NotFound):
        return read
    fingerprint = NO_FINGERPRINT if isinstance(read, NotFound) else read
    known.put(version, fingerprint)
    return fingerprint


def base_model(reference: str) -> Flow[Fingerprint]:
    """Returns the fingerprint of a version's base model, as it is now."""
    answer: Answer = yield Request("GET", _path(reference))
    try:
        return Fingerprint.of(answer.json_object())
    except InvalidRequest as error:
        raise InvalidResponse(f"the fingerprint of a base model is malformed: {error}") from error


def put_base_model(known: Fingerprints, reference: str, fingerprint: Mapping[str, Any]) -> Flow[None]:
    """Replaces the fingerprint of a version's base model, and forgets what was read of it."""
    yield Request("PUT", _path(reference), json=dict(fingerprint))
    known.clear()


def _path(reference: str) -> str:
    return adapter_path(*parse_qualified(reference), "base-model")
