"""The clients' operations without I/O: each flow yields requests, and receives their answers.

`PrefixClient` and `AsyncPrefixClient` drive the same flows, so there is one way to do each thing.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from prefix_service.client.base_model_check import BaseModelCheck
from prefix_service.client.cache.cache import Cached, LocalCache
from prefix_service.client.cache.disk_cache import DiskCache, Entry
from prefix_service.client.cache.fingerprints import Fingerprints
from prefix_service.client.flows import base_models
from prefix_service.client.flows.question import Question, require_version
from prefix_service.client.flows.watched import Watched
from prefix_service.client.options import PrefixOptions
from prefix_service.client.protocol import Answer, Flow, Progress, Request, Work, adapter_path, check_digest
from prefix_service.client.service_state import ServiceState
from prefix_service.errors import InvalidRequest, InvalidResponse, PrefixServiceError
from prefix_service.prefix.fingerprint import NO_FINGERPRINT, Fingerprint
from prefix_service.prefix.references import parse_qualified

if TYPE_CHECKING:
    from prefix_service.client.prefixes.float8_error import Float8Error
    from prefix_service.client.prefixes.prefix import Prefix

_QUICKLY_COPIED: Final = 2 << 20  # bytes that an event loop may copy between two turns

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Reading:
    """Options and caches for reading prefixes: the caches of prefixes and of base models, the memory that they may use,
    which digests are verified, what is known of the service, and what a watch has told of it.

    `is_service_known` is whether entries on disk certainly belong to this service. Without a key, it cannot be
    distinguished from an earlier service at the same address, so even immutable versions are revalidated.
    """

    memory: LocalCache
    disk: DiskCache | None
    allocate: Callable[[int], memoryview]
    pinned: bool
    verify_digest: bool
    is_service_known: bool
    service: ServiceState
    watched: Watched
    base_model_check: BaseModelCheck
    fingerprints: Fingerprints = field(default_factory=Fingerprints)

    def is_of_service(self, catalog: str | None) -> bool:
        """Returns whether what was cached with the name of a catalog may be this service's."""
        return catalog is None or self.service.catalog in (None, catalog)


def get(reading: Reading, reference: str, options: PrefixOptions, progress: Progress | None = None) -> "Flow[Prefix]":
    """Returns a prefix in memory of the caller's own, from a cache or from the service.

    Raises:
        InvalidReference, InvalidRequest: the reference is malformed, or options contradict each other.
        InvalidResponse: the answer is damaged, or answers another question.
    """
    cached = yield from _cached(reading, Question.of(reference, options), progress)
    own = partial(_own, reading, cached)
    one: Prefix = own() if _is_quickly_owned(reading, cached) else (yield Work(own))
    prefix = one.for_batch(options.get("batch_size", 1))
    if options.get("materialise"):
        prefix = yield Work(prefix.materialise)
    return prefix


def shared(reading: Reading, reference: str, options: PrefixOptions) -> "Flow[Prefix]":
    """Returns a prefix as the cache holds it, without a copy: only for
    callers that neither change it nor pass it on.
    """
    cached = yield from _cached(reading, Question.of(reference, options))
    return cached.prefix


def refreshed(reading: Reading, question: Question) -> Flow[None]:
    """Asks a question again, whose answer has changed, and caches the new answer."""
    yield from _cached(reading, question, is_changed=True)


def _cached(
    reading: Reading, question: Question, progress: Progress | None = None, *, is_changed: bool = False
) -> Flow[Cached]:
    """Returns the answer to a question, from a cache or from the service. A cached one is revalidated, unless it is
    immutable or a watch confirms it."""
    cached, is_current = reading.memory.get(question.key), question.reference.immutable
    if cached is not None and not reading.is_of_service(cached.catalog):  # an earlier service's, from `cache_dir`
        cached = None
    if cached is not None and not is_current and not is_changed:
        is_current = reading.watched.confirms(question.tenant, question.reference.adapter, cached.stamp)
    if cached is None and reading.disk is not None:
        cached, is_current = (yield Work(partial(_load, reading, question))), is_current and reading.is_service_known
    if cached is None or not is_current:
        stamp = reading.watched.stamp()
        etag = None if cached is None else cached.etag or None
        read = partial(_received, reading, question, cached)
        blocks = reading.disk is not None
        request = question.request(etag, read, is_verified=reading.verify_digest, blocks=blocks)
        cached = yield request if progress is None else replace(request, progress=progress)
        cached = yield from _with_base_model(reading, cached)
        if stamp is not None:
            cached = replace(cached, stamp=stamp)
    reading.memory.put(question.key, cached)
    return cached


def _with_base_model(reading: Reading, cached: Cached) -> Flow[Cached]:
    """Returns a cached prefix with the fingerprint of its base model, which is asked for if the service has one."""
    if reading.base_model_check == "off":
        return cached
    found: Fingerprint | PrefixServiceError = NO_FINGERPRINT
    if cached.has_base_model:
        found = yield from base_models.recent(reading.fingerprints, cached.prefix.reference)
    if isinstance(found, PrefixServiceError):
        log.info("the base model of %s cannot be compared: %s", cached.prefix.name, found)
        return cached
    return replace(cached, prefix=replace(cached.prefix, base_model=found))


def _is_quickly_owned(reading: Reading, cached: Cached) -> bool:
    """Returns whether an event loop can make the caller's copy itself, without a thread."""
    return cached.file is not None or (cached.prefix.kv.nbytes <= _QUICKLY_COPIED and not reading.pinned)


def _own(reading: Reading, cached: Cached) -> "Prefix":
    from prefix_service.client.flows.decode import own

    return own(cached, is_shared=reading.memory.keeps(cached), pinned=reading.pinned)


def float8_error(reading: Reading, reference: str) -> "Flow[Float8Error]":
    """Returns the error of float8 for a version, by comparing both of its renderings."""
    exact: Prefix = yield from shared(reading, reference, {})
    tenant, parsed = parse_qualified(reference)
    same = f"{tenant}/{parsed.adapter}@{exact.digest}"  # the alias may move in between
    found: Prefix = yield from shared(reading, same, {"dtype": "float8_e4m3fn"})

    def compared() -> "Float8Error":
        from prefix_service.client.prefixes.float8_error import float8_error

        return float8_error(exact, found)

    error: Float8Error = yield Work(compared)
    return error


def _load(reading: Reading, question: Question) -> Cached | None:
    """Returns the answer that the disk has to a question.

    Removes an entry under its name that answers another question.
    """
    entry = None if reading.disk is None else reading.disk.load(question.key, reading.allocate)
    if reading.disk is None or entry is None or not reading.is_of_service(entry.catalog):
        return None
    try:
        return _decoded(reading, question, entry, {})
    except InvalidResponse as error:
        log.warning("an entry of the prefix cache on disk is removed: %s", error)
        reading.disk.remove(question.key)
        return None


def _received(reading: Reading, question: Question, cached: Cached | None, answer: Answer) -> Cached:
    """Returns the cached answer if a 304 says that it is current, else the new one, checked and stored on disk."""
    try:
        return _checked(reading, question, cached, answer)
    except PrefixServiceError as error:
        error.met_by(answer.request_id)
        raise


def _checked(reading: Reading, question: Question, cached: Cached | None, answer: Answer) -> Cached:
    if answer.status == 304 and cached is not None and cached.etag:
        question.require_current(cached.etag, cached.prefix.metadata, answer.headers)
        return replace(cached, has_base_model=_names_base_model(answer.headers))
    if answer.status != 200:
        raise InvalidResponse(f"status {answer.status} where 200 was expected")
    if reading.verify_digest:
        check_digest(answer)
    entry = Entry(answer.body, answer.headers.get("etag", ""), answer.headers.get("prefix-catalog"))
    found = _decoded(reading, question, entry, answer.headers)
    if reading.disk is not None:
        reading.disk.store(question.key, entry)
    return found


def _decoded(reading: Reading, question: Question, entry: Entry, headers: Mapping[str, str]) -> Cached:
    from prefix_service.client.flows.decode import decode

    found = decode(entry.body, entry.etag, reading.allocate)
    question.require_answer(found.prefix.metadata, headers)
    prefix = replace(found.prefix, base_model_check=reading.base_model_check)
    return replace(found, prefix=prefix, catalog=entry.catalog, has_base_model=_names_base_model(headers))


def _names_base_model(headers: Mapping[str, str]) -> bool:
    return "prefix-base-model" in headers


def adapter_alone(text: str) -> tuple[str, str]:
    """Returns the tenant and the name of an adapter, for calls that are about no version of it.

    Raises:
        InvalidReference: the text is not of the form `tenant/name`.
        InvalidRequest: the text names a version.
    """
    tenant, parsed = parse_qualified(text)
    if parsed.explicit:
        raise InvalidRequest(
            f"name {tenant}/{parsed.adapter} without @{parsed.selector}: this call is about no version of it"
        )
    return tenant, parsed.adapter


def inspect(reference: str) -> Flow[Mapping[str, Any]]:
    """Returns the service's description of a version."""
    found, _ = yield from described(reference)
    return found


def described(reference: str) -> Flow[tuple[Mapping[str, Any], bool]]:
    """Returns the service's description of a version, and whether it has a fingerprint of the version's base model."""
    tenant, parsed = parse_qualified(reference)
    answer: Answer = yield Request("GET", adapter_path(tenant, parsed))
    return require_version(answer.json_object(), tenant, parsed), _names_base_model(answer.headers)


def is_ready() -> Flow[bool]:
    """Returns whether the service is ready."""
    answer: Answer = yield Request("GET", "/readyz")
    return answer.status == 200 and bool(answer.json_object())
