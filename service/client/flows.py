"""What the clients do, without I/O: each flow yields requests and is sent their answers.

`PrefixClient` and `AsyncPrefixClient` drive the same flows, so there is one way to do each thing.
"""

from collections.abc import Generator, Mapping
from typing import Any, BinaryIO, Final, TypeVar

from service.client.cache import Cached, LocalCache
from service.client.prefix import Prefix
from service.client.protocol import Answer, Request, adapter_path, check_digest, prefix_request, tenant_path
from service.errors import InvalidRequest, InvalidResponse
from service.prefix.form import KVDtype, Span
from service.prefix.references import parse_qualified
from service.prefix.wire import read_kv, read_message

T = TypeVar("T")
Flow = Generator[Request, Answer, T]

_PAGE: Final = 1000  # the most that the service gives at once


def get(
    cache: LocalCache,
    reference: str,
    *,
    batch_size: int,
    dtype: KVDtype | None,
    layers: Span | None,
    kv_heads: Span | None,
    verify_digest: bool,
) -> Flow[Prefix]:
    """A prefix from the cache, revalidated unless it is immutable, or from the service."""
    tenant, parsed = parse_qualified(reference)
    key = (tenant, parsed.adapter, parsed.selector, dtype, layers, kv_heads)
    cached = cache.get(key)
    if cached is None or not parsed.immutable:
        etag = None if cached is None else cached.etag
        answer = yield prefix_request(tenant, parsed, dtype=dtype, layers=layers, kv_heads=kv_heads, etag=etag)
        if answer.status != 304 or cached is None:
            cached = _received(answer, verify_digest=verify_digest)
            cache.put(key, cached)
    return cached.prefix.for_batch(batch_size)


def _received(answer: Answer, *, verify_digest: bool) -> Cached:
    if answer.status != 200:
        raise InvalidResponse(f"status {answer.status} where 200 was expected")
    if verify_digest:
        check_digest(answer)
    received = read_message(answer.body)
    return Cached(Prefix(read_kv(received), received.metadata), answer.headers.get("etag", ""))


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
    answer = yield Request("GET", "/readyz")
    return answer.status == 200
