"""The service as vLLM's processes see it: a client whose key may be rotated while they run."""

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from prefix_service.client.client import AsyncPrefixClient
from prefix_service.client.flows.resolving import ResolvedVersion
from prefix_service.client.vllm.config import ConnectorConfig
from prefix_service.client.vllm.reused_memory import ReusedMemory
from prefix_service.errors import InvalidRequest, InvalidResponse, NotFound, Unauthenticated

if TYPE_CHECKING:
    from prefix_service.client.prefixes.prefix import Prefix

T = TypeVar("T")

log = logging.getLogger("vllm.prefix_service")


class _Client(AsyncPrefixClient):
    """A client that receives prefixes into reused memory."""

    def __init__(self, memory: ReusedMemory, *arguments: Any, **options: Any) -> None:
        self._memory = memory
        super().__init__(*arguments, **options)

    def _allocator(self, cache_bytes: int, *, pinned: bool) -> Callable[[int], memoryview]:
        return self._memory.allocate


class Source:
    """Reads prefixes on one event loop. With `memory` it receives them there, and caches none in memory.

    Raises:
        InvalidRequest: the configuration has a URL that is none, or names a key's file that cannot be read.
    """

    def __init__(self, config: ConnectorConfig, memory: ReusedMemory | None = None) -> None:
        self._config, self._memory = config, memory
        self.timeout = config.timeout
        self._key = config.api_key()
        self._client = self._new_client()
        self._calls = Counter[AsyncPrefixClient]()  # under way, of clients whose key was replaced too
        self._tenant: tuple[AsyncPrefixClient, asyncio.Task[str | None]] | None = None

    def _new_client(self) -> AsyncPrefixClient:
        config = self._config
        make = AsyncPrefixClient if self._memory is None else partial(_Client, self._memory)
        return make(
            config.url,
            self._key or "",  # None would read PREFIX_API_KEY, which `api_key_env` may have replaced
            uds=config.uds,
            ca_file=config.ca_file,
            timeout=config.timeout,
            cache_bytes=config.cache_bytes if self._memory is None else 0,
            cache_dir=config.cache_dir,
            cache_dir_bytes=config.cache_dir_bytes,
            verify_digest=config.verify_digest,
            connections=config.connections,
            shared_memory=config.shared_memory,
            base_model_check="off",  # of prefixes: `BaseModel` compares versions, once for all ranks
        )

    async def get(self, reference: str, **options: Any) -> "Prefix":
        """Returns a prefix as `AsyncPrefixClient.get` does. If the service does not know the key, `api_key_file` is
        read again, and if it has another key by now, the service is asked once more with that.

        Raises:
            PrefixServiceError: as `AsyncPrefixClient.get`.
        """
        return await self._call(lambda client: client.get(reference, **options))

    async def resolve(self, reference: str) -> ResolvedVersion:
        """Returns which version a reference means, as `AsyncPrefixClient.resolve` does: by one request, unless its base
        model has a fingerprint. A refused key is read again, as in `get`.

        Raises:
            PrefixServiceError: as `AsyncPrefixClient.resolve`.
        """
        return await self._call(lambda client: client.resolve(reference))

    async def inspect(self, reference: str) -> Mapping[str, Any]:
        """Returns what the service knows of a version; a refused key is read again, as in `get`.

        Raises:
            PrefixServiceError: as `AsyncPrefixClient.inspect`.
        """
        return await self._call(lambda client: client.inspect(reference))

    async def tenants(self) -> list[dict[str, Any]]:
        """Returns every tenant; a refused key is read again, as in `get`.

        Raises:
            PrefixServiceError: as `AsyncPrefixClient.tenants`.
        """
        return await self._call(lambda client: client.tenants())

    async def list_page(self, tenant: str, cursor: str | None, limit: int) -> tuple[list[dict[str, Any]], str | None]:
        """Returns some adapters of a tenant and the cursor of the next page; a refused key is read again, as in `get`.

        Raises:
            PrefixServiceError: as `AsyncPrefixClient.list_page`.
        """
        return await self._call(lambda client: client.list_page(tenant, cursor=cursor, limit=limit))

    async def tenant(self) -> str | None:
        """Returns the tenant of the key, None for a key of the platform. The service is asked once for each key, by
        all callers together; a failure is not remembered.

        Raises:
            PrefixServiceError: the service reported it, or did not answer.
        """
        if self._tenant is None or self._tenant[0] is not self._client or _has_failed(self._tenant[1]):
            self._tenant = self._client, asyncio.create_task(self._ask_tenant())
        return await asyncio.shield(self._tenant[1])

    async def _ask_tenant(self) -> str | None:
        try:
            tenant = (await self._call(lambda client: client.whoami())).get("tenant")
        except NotFound:  # an older service does not report it: taken for a platform's key, which allows least here
            return None
        if tenant is not None and not isinstance(tenant, str):
            raise InvalidResponse(f"a key's tenant should be a name or null, got {tenant!r:.100}")
        return tenant

    async def _call(self, ask: Callable[[AsyncPrefixClient], Awaitable[T]]) -> T:
        client = self._client
        try:
            try:
                return await self._ask(client, ask)
            except Unauthenticated:
                if not await self._has_renewed(client):
                    raise
            return await self._ask(self._client, ask)
        except Unauthenticated as error:  # callers of vLLM have a key of their own: they must not take it for that
            place = self._config.api_key_env if self._config.api_key_file is None else "api_key_file"
            raise Unauthenticated(
                f"prefix-service refuses the key that vLLM has from {place}: {error.message}"
            ) from error

    async def _ask(self, client: AsyncPrefixClient, ask: Callable[[AsyncPrefixClient], Awaitable[T]]) -> T:
        self._calls[client] += 1
        try:
            return await ask(client)
        finally:
            self._calls[client] -= 1
            await self._close_unless_needed(client)

    async def _close_unless_needed(self, client: AsyncPrefixClient) -> None:
        """Closes a client whose key was replaced, once no call waits for its answers."""
        if not self._calls[client]:
            del self._calls[client]
            if client is not self._client:
                await client.close()

    async def _has_renewed(self, client: AsyncPrefixClient) -> bool:
        """Returns whether another client has replaced the one whose key was refused."""
        if self._client is client:
            try:
                key = await asyncio.to_thread(self._config.api_key)
            except InvalidRequest as error:
                log.warning("the service refuses the key, and %s", error)
                return False
            if self._client is client and key != self._key:
                self._key = key
                self._client = self._new_client()
                if self._tenant is not None:  # asked while the service answers, for requests that come while it is away
                    self._tenant = self._client, asyncio.create_task(self._ask_tenant())
                    self._tenant[1].add_done_callback(_has_failed)  # its exception counts as retrieved
                await self._close_unless_needed(client)
        return self._client is not client

    def forget(self) -> None:
        """Forgets every prefix that was fetched, in `cache_dir` too."""
        self._client.clear_cache()

    async def close(self) -> None:
        """Closes every connection."""
        if self._tenant is not None:
            self._tenant[1].cancel()
        for client in {*self._calls, self._client}:
            await client.close()


def _has_failed(task: "asyncio.Task[Any]") -> bool:
    return task.done() and (task.cancelled() or task.exception() is not None)
