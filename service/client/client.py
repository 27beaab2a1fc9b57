"""`PrefixClient` and `AsyncPrefixClient`: what a worker talks to the service with."""

from collections.abc import Mapping
from typing import Any, BinaryIO, Self, TypeVar, Unpack

from service.client import flows
from service.client.cache import LocalCache
from service.client.flows import Flow
from service.client.options import ClientOptions, PrefixOptions
from service.client.prefix import Prefix
from service.client.transport import AsyncTransport, Connection, Transport

T = TypeVar("T")


class _Client:
    def __init__(self, base_url: str, api_key: str | None, options: ClientOptions) -> None:
        self._connection = Connection(
            base_url,
            api_key,
            uds=options.get("uds"),
            ca_file=options.get("ca_file"),
            timeout=options.get("timeout", 60.0),
            http=options.get("http"),
        )
        self._cache = LocalCache(options.get("cache_bytes", 1 << 30))
        verify_digest = options.get("verify_digest")
        self._verify_digest = not self._connection.is_local if verify_digest is None else verify_digest

    def clear_cache(self) -> None:
        """Forget every prefix that was fetched. Only this does: a deletion or a revoked key does not reach into the
        cache of a worker."""
        self._cache.clear()

    def _get(self, reference: str, options: PrefixOptions) -> Flow[Prefix]:
        return flows.get(
            self._cache,
            reference,
            batch_size=options.get("batch_size", 1),
            dtype=options.get("dtype"),
            layers=options.get("layers"),
            kv_heads=options.get("kv_heads"),
            verify_digest=self._verify_digest,
        )


class PrefixClient(_Client):
    """A client of prefix-service; safe to share between threads, and a context manager.

    Options, all by keyword: `uds` (Unix socket to connect to), `ca_file` (certificate authorities to trust),
    `timeout` (deadline of a call with its retries, in seconds; 60), `cache_bytes` (budget of the local cache; 1 GiB),
    `verify_digest` (compare bodies with their digest; on unless the service is on this machine), `http` (an httpx
    transport). Every method raises the errors of `service.errors`; reads and publishing are retried when the service
    is not there or says so.
    """

    def __init__(self, base_url: str, api_key: str | None = None, **options: Unpack[ClientOptions]) -> None:
        super().__init__(base_url, api_key, options)
        self._transport = Transport(self._connection)

    def get(self, reference: str, **options: Unpack[PrefixOptions]) -> Prefix:
        """The prefix of `tenant/adapter`, `…@7`, `…@alias` or `…@sha256:…`.

        Options: `batch_size` (rows, made locally; 1), `dtype` (default: that of the stored weights; float8 is decoded
        to float32 on arrival), `layers` and `kv_heads` (half-open ranges `(a, b)`).

        Raises:
            NotFound, Unauthenticated, InvalidInput, …: the service said so.
            ConnectionFailed: the service did not answer in time.
            InvalidResponse: what arrived is damaged.
        """
        return self.run(self._get(reference, options))

    def publish(
        self, adapter: str, config: bytes, weights: BinaryIO, base_model_config: bytes | None = None
    ) -> tuple[Mapping[str, Any], bool]:
        """Publish a version of `tenant/name`; what the service says of it, and whether it is new.

        `config` and `weights` are the files that PEFT's `save_pretrained` wrote, or another supported layout;
        `base_model_config` is the base model's `config.json`, for dimensions that the adapter's config leaves out.

        Raises:
            InvalidConfig, InvalidCheckpoint, TooLarge, …: the service said so; nothing was published.
        """
        return self.run(flows.publish(adapter, config, weights, base_model_config))

    def inspect(self, reference: str) -> Mapping[str, Any]:
        """What the service knows of a version: config, shapes, parameter counts, digest, size, aliases, residency.

        Raises:
            NotFound, …: the service said so.
        """
        return self.run(flows.inspect(reference))

    def list(self, tenant: str, base_model: str | None = None) -> list[Mapping[str, Any]]:
        """Every adapter of a tenant, in the order of their names.

        Raises:
            NotFound, …: the service said so.
        """
        return self.run(flows.list_adapters(tenant, base_model))

    def is_ready(self) -> bool:
        """Whether the service can do its work.

        Raises:
            Unavailable: it says that it cannot.
            ConnectionFailed: it does not answer.
        """
        return self.run(flows.is_ready())

    def run(self, flow: Flow[T]) -> T:
        """Carry out a flow of `service.client.management`: aliases, deletion, residency, tenants, audit.

        Raises:
            NotFound, Forbidden, …: the service said so.
        """
        try:
            request = next(flow)
            while True:
                request = flow.send(self._transport.send(request))
        except StopIteration as end:
            result: T = end.value
            return result

    def close(self) -> None:
        """Close every connection."""
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


class AsyncPrefixClient(_Client):
    """The same for asyncio: same options, same methods, awaitable. Belongs to one event loop."""

    def __init__(self, base_url: str, api_key: str | None = None, **options: Unpack[ClientOptions]) -> None:
        super().__init__(base_url, api_key, options)
        self._transport = AsyncTransport(self._connection)

    async def get(self, reference: str, **options: Unpack[PrefixOptions]) -> Prefix:
        """As `PrefixClient.get`."""
        return await self.run(self._get(reference, options))

    async def publish(
        self, adapter: str, config: bytes, weights: BinaryIO, base_model_config: bytes | None = None
    ) -> tuple[Mapping[str, Any], bool]:
        """As `PrefixClient.publish`."""
        return await self.run(flows.publish(adapter, config, weights, base_model_config))

    async def inspect(self, reference: str) -> Mapping[str, Any]:
        """As `PrefixClient.inspect`."""
        return await self.run(flows.inspect(reference))

    async def list(self, tenant: str, base_model: str | None = None) -> list[Mapping[str, Any]]:
        """As `PrefixClient.list`."""
        return await self.run(flows.list_adapters(tenant, base_model))

    async def is_ready(self) -> bool:
        """As `PrefixClient.is_ready`."""
        return await self.run(flows.is_ready())

    async def run(self, flow: Flow[T]) -> T:
        """As `PrefixClient.run`."""
        try:
            request = next(flow)
            while True:
                request = flow.send(await self._transport.send(request))
        except StopIteration as end:
            result: T = end.value
            return result

    async def close(self) -> None:
        """Close every connection."""
        await self._transport.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self.close()
