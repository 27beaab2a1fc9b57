"""What the clients do, without I/O: each flow yields requests and is sent their answers.

`PrefixClient` and `AsyncPrefixClient` drive the same flows, so there is one way to do each thing.
"""

from collections.abc import Generator, Mapping
from typing import Any, BinaryIO, TypeVar

from service.client.cache import Cached, LocalCache
from service.client.prefix import Prefix
from service.client.protocol import Answer, Request, adapter_path, check_digest, prefix_request
from service.errors import InvalidRequest, InvalidResponse
from service.prefix.kv import Span
from service.prefix.references import check_name, parse_qualified
from service.prefix.wire import KVDtype, read_kv, read_message

T = TypeVar("T")
Flow = Generator[Request, Answer, T]


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
    tenant, parsed = parse_qualified(adapter)
    if parsed.explicit:
        raise InvalidRequest(f"publish to {tenant}/{parsed.adapter}, without @{parsed.selector}: versions are numbered")
    files: dict[str, bytes | BinaryIO] = {"adapter_config.json": config}
    if base_model_config is not None:
        files["base_model_config"] = base_model_config
    files["adapter_model.safetensors"] = weights
    answer = yield Request("POST", adapter_path(tenant, parsed.adapter, "versions"), files=files)
    return answer.json(), answer.status == 201


def inspect(reference: str) -> Flow[Mapping[str, Any]]:
    """What the service knows of a version."""
    tenant, parsed = parse_qualified(reference)
    answer = yield Request("GET", adapter_path(tenant, parsed))
    found: Mapping[str, Any] = answer.json()
    return found


def list_adapters(tenant: str, base_model: str | None) -> Flow[list[Mapping[str, Any]]]:
    """Every adapter of a tenant, page by page."""
    params = {} if base_model is None else {"base_model": base_model}
    items: list[Mapping[str, Any]] = []
    path = f"/v1/tenants/{check_name('tenant', tenant)}/adapters"
    while True:
        page = (yield Request("GET", path, {**params, "limit": "1000"})).json()
        items += page["items"]
        if page["next"] is None:
            return items
        params["cursor"] = page["next"]


def is_ready() -> Flow[bool]:
    """Whether the service can do its work."""
    answer = yield Request("GET", "/readyz")
    return answer.status == 200
