"""What the clients do, without I/O: each flow yields requests and is sent their answers.

`PrefixClient` and `AsyncPrefixClient` drive the same flows, so there is one way to do each thing.
"""

from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, BinaryIO, Final, TypeVar

from service.client.cache import Cached, LocalCache
from service.client.disk_cache import DiskCache, Entry
from service.client.options import PrefixOptions
from service.client.protocol import (
    Answer,
    Buffer,
    Request,
    Step,
    Work,
    adapter_path,
    check_digest,
    prefix_request,
    tenant_path,
)
from service.errors import InvalidRequest, InvalidResponse
from service.prefix.form import Span
from service.prefix.ranks import Rank, check_rank
from service.prefix.references import parse_qualified

if TYPE_CHECKING:
    from service.client.float8 import Float8Error
    from service.client.prefix import Prefix

T = TypeVar("T")
Flow = Generator[Step, Any, T]

_PAGE: Final = 1000  # the most that the service gives at once


@dataclass(frozen=True, slots=True)
class Reading:
    """How prefixes are read: what is kept of them, memory for those that are read from disk, and what is verified.

    `is_service_known` says that entries on disk certainly are this service's: without a key, nothing tells it from an
    earlier one at the same address, and even versions are revalidated.
    """

    memory: LocalCache
    disk: DiskCache | None
    allocate: Callable[[int], memoryview]
    verify_digest: bool
    is_service_known: bool


def get(reading: Reading, reference: str, options: PrefixOptions) -> "Flow[Prefix]":
    """A prefix from a cache, revalidated unless it is immutable, or from the service."""
    tenant, parsed = parse_qualified(reference)
    dtype, (layers, kv_heads, tp) = options.get("dtype"), _part(options)
    key = (tenant, parsed.adapter, parsed.selector, dtype, layers, kv_heads, tp)
    cached, is_current = reading.memory.get(key), parsed.immutable
    if cached is None and reading.disk is not None:
        cached, is_current = (yield Work(partial(_load, reading, key))), is_current and reading.is_service_known
    if cached is None or not is_current:
        cached = yield prefix_request(
            tenant,
            parsed,
            dtype=dtype,
            layers=layers,
            kv_heads=kv_heads,
            tp=tp,
            etag=None if cached is None else cached.etag,
            read=partial(_received, reading, key, cached),
            is_verified=reading.verify_digest,
            blocks=reading.disk is not None,
        )
    reading.memory.put(key, cached)
    prefix: Prefix = cached.prefix.for_batch(options.get("batch_size", 1))
    if options.get("materialise"):
        prefix = yield Work(prefix.materialise)
    return prefix


def float8_error(reading: Reading, reference: str) -> "Flow[Float8Error]":
    """What float8 costs a version: both renderings of it, compared."""
    exact: Prefix = yield from get(reading, reference, {})
    tenant, parsed = parse_qualified(reference)
    same = f"{tenant}/{parsed.adapter}@{exact.digest}"  # the alias may move in between
    found: Prefix = yield from get(reading, same, {"dtype": "float8_e4m3fn"})

    def compared() -> "Float8Error":
        from service.client.float8 import float8_error

        return float8_error(exact.kv, found.kv)

    error: Float8Error = yield Work(compared)
    return error


def _part(options: PrefixOptions) -> tuple[Span | None, Span | None, Rank | None]:
    """Layers, heads and rank. Which heads a rank has is the service's to say: only it knows how many the version has
    that an alias means now."""
    layers, kv_heads, tp, pp = (options.get("layers"), options.get("kv_heads"), options.get("tp"), options.get("pp"))
    if layers is not None and pp is not None:
        raise InvalidRequest(f"pp={pp} says which layers, and layers={layers} too: give one of them")
    if kv_heads is not None and tp is not None:
        raise InvalidRequest(f"tp={tp} says which heads, and kv_heads={kv_heads} too: give one of them")
    return layers if pp is None else pp, kv_heads, None if tp is None else check_rank(tp)


def _load(reading: Reading, key: tuple[Any, ...]) -> Cached | None:
    """What the disk has."""
    entry = None if reading.disk is None else reading.disk.load(key, reading.allocate)
    try:
        return None if entry is None else _decoded(entry.body, entry.etag)
    except InvalidResponse:  # of another release's format
        return None


def _received(reading: Reading, key: tuple[Any, ...], cached: Cached | None, answer: Answer) -> Cached:
    """What the service answered, decoded and kept on disk; what is cached already where that is current."""
    if answer.status == 304 and cached is not None:
        return cached
    if answer.status != 200:
        raise InvalidResponse(f"status {answer.status} where 200 was expected")
    if reading.verify_digest:
        check_digest(answer)
    found = _decoded(answer.body, answer.headers.get("etag", ""))
    if reading.disk is not None:
        reading.disk.store(key, Entry(answer.body, found.etag))
    return found


def _decoded(body: Buffer, etag: str) -> Cached:
    from service.client.decode import decode

    return Cached(decode(body), etag)


def publish(
    adapter: str, config: bytes, weights: BinaryIO, base_model_config: bytes | None
) -> Flow[tuple[Mapping[str, Any], bool]]:
    """A new version of `tenant/name`, and whether it is new."""
    tenant, name = adapter_alone(adapter)
    files: dict[str, bytes | BinaryIO] = {"adapter_config.json": config}
    if base_model_config is not None:
        files["base_model_config"] = base_model_config
    files["adapter_model.safetensors"] = weights
    answer = yield Request("POST", adapter_path(tenant, name, "versions"), files=files)
    return answer.json(), answer.status == 201


def compose(adapter: str, references: Iterable[str]) -> Flow[tuple[Mapping[str, Any], bool]]:
    """A new version of `tenant/name`, the concatenation of others, and whether it is new."""
    tenant, name = adapter_alone(adapter)
    answer = yield Request("POST", adapter_path(tenant, name, "versions"), json={"compose": list(references)})
    return answer.json(), answer.status == 201


def adapter_alone(text: str) -> tuple[str, str]:
    """The tenant and the name of an adapter, where no version of it is meant.

    Raises:
        InvalidReference: it is not of the form `tenant/name`.
        InvalidRequest: it names a version.
    """
    tenant, parsed = parse_qualified(text)
    if parsed.explicit:
        raise InvalidRequest(f"{tenant}/{parsed.adapter} alone is meant here, without @{parsed.selector}")
    return tenant, parsed.adapter


def inspect(reference: str) -> Flow[Mapping[str, Any]]:
    """What the service knows of a version."""
    tenant, parsed = parse_qualified(reference)
    answer = yield Request("GET", adapter_path(tenant, parsed))
    found: Mapping[str, Any] = answer.json()
    return found


def list_adapters(tenant: str, base_model: str | None) -> Flow[list[Mapping[str, Any]]]:
    """Every adapter of a tenant."""
    params = {} if base_model is None else {"base_model": base_model}
    return (yield from pages(tenant_path(tenant, "adapters"), params))


def pages(
    path: str, params: Mapping[str, str] | None = None, limit: int | None = None
) -> Flow[list[Mapping[str, Any]]]:
    """A listing, page by page, to its end or to `limit` items."""
    items: list[Mapping[str, Any]] = []
    asked = dict(params or {})
    while True:
        asked["limit"] = str(_PAGE if limit is None else min(_PAGE, limit - len(items)))
        page = (yield Request("GET", path, asked)).json()
        items += page["items"]
        if page["next"] is None or len(items) == limit:
            return items
        asked["cursor"] = page["next"]


def is_ready() -> Flow[bool]:
    """Whether the service can do its work."""
    answer: Answer = yield Request("GET", "/readyz")
    return answer.status == 200
