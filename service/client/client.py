"""`PrefixClient` and `AsyncPrefixClient`: what a worker talks to the service with."""

import asyncio
import hashlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, Self, TypeVar, Unpack

from service.client import flows, many
from service.client.cache import LocalCache
from service.client.connection import Connection
from service.client.disk_cache import DiskCache
from service.client.fetcher import Fetcher
from service.client.flows import Flow, Reading
from service.client.options import ClientOptions, PrefixOptions
from service.client.protocol import Step
from service.client.transport import AsyncTransport, Transport
from service.errors import PrefixServiceError

if TYPE_CHECKING:
    from torch import Tensor

    from service.client.float8 import Float8Error
    from service.client.mixed import MixedPrefix
    from service.client.prefix import Prefix

_AT_ONCE: Final = 8

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
        self._pin_memory = options.get("pin_memory", False)
        verify_digest = options.get("verify_digest")
        self._reading = Reading(
            LocalCache(options.get("cache_bytes", 1 << 30)),
            self._disk_cache(options.get("cache_dir"), options.get("cache_dir_bytes", 10 << 30)),
            self._allocate,
            verify_digest=self._connection.uds is None if verify_digest is None else verify_digest,
            is_service_known=api_key is not None,
        )

    def _disk_cache(self, folder: str | Path | None, budget: int) -> DiskCache | None:
        if folder is None:
            return None
        url, uds, key = (self._connection.url, self._connection.uds, self._connection.api_key)
        secret = None if key is None else hashlib.sha256(key.encode()).hexdigest()
        return DiskCache(Path(folder), budget, (str(url).rstrip("/"), None if uds is None else str(uds), secret))

    def _fetcher(self, options: ClientOptions) -> Fetcher | None:
        if self._connection.http is not None:
            return None
        # What is mapped is not pinned.
        shares = self._connection.uds is not None and options.get("shared_memory", True) and not self._pin_memory
        connections = options.get("connections", 1)
        return Fetcher(self._connection, self._allocate, connections, pinned=self._pin_memory, shared_memory=shares)

    def _allocate(self, size: int) -> memoryview:
        from service.client.decode import allocate

        return allocate(size, pinned=self._pin_memory)

    def clear_cache(self) -> None:
        """Forget every prefix that was fetched, in memory and in `cache_dir`, there also what other clients fetched.
        Only this does: a deletion or a revoked key does not reach into the cache of a worker."""
        self._reading.memory.clear()
        if self._reading.disk is not None:
            self._reading.disk.clear()


class PrefixClient(_Client):
    """A client of prefix-service; safe to share between threads, and a context manager.

    Options, all by keyword:

    - `uds` (Unix socket to connect to), `ca_file` (certificate authorities to trust), `timeout` (deadline of a call
      with its retries, in seconds; 60).
    - `cache_bytes` (budget of the local cache in memory; 1 GiB), `cache_dir` (a private folder where bodies are kept
      too, shared by the processes of this machine; none), `cache_dir_bytes` (its budget; 10 GiB). Without a key, what
      is on disk is always revalidated.
    - `verify_digest` (compare bodies with their digest: CRC-32C, or SHA-256 from a service that has no other; on unless
      `uds` is set).
    - `pin_memory` (receive into pinned memory, from which `prefix.to("cuda")` copies fastest; False).
    - `connections` (fetch bodies of more than 32 MiB in ranges over as many connections; 1). It pays where one
      connection is slower than the network: a proxy that limits each, a long way, TLS; not on one machine.
    - `shared_memory` (with `uds`, map what the service has in shared memory instead of receiving it: no copy; True).
      Not with `pin_memory`.
    - `http` (an httpx transport that takes the place of the client's own).

    Every method raises the errors of `service.errors`; reads and publishing are retried when the service is not there
    or says so.
    """

    def __init__(self, base_url: str, api_key: str | None = None, **options: Unpack[ClientOptions]) -> None:
        super().__init__(base_url, api_key, options)
        self._transport = Transport(self._connection, self._fetcher(options))

    def get(self, reference: str, **options: Unpack[PrefixOptions]) -> "Prefix":
        """The prefix of `tenant/adapter`, `…@7`, `…@alias` or `…@sha256:…`.

        Options: `batch_size` (rows; 1), `dtype` (default: that of the stored weights; float8 is decoded to float32 on
        arrival), `layers` and `kv_heads` (half-open ranges `(a, b)`), `materialise` (False). One row travels whatever
        the batch; the rows are views of it, or with `materialise` copies of their own to write to, made here, which is
        faster than to send them.

        A rank of a sharded model says instead: `tp` (`(rank, size)`: this tensor-parallel rank's heads as vLLM and
        Megatron place them, each on several ranks where there are more ranks than heads) and `pp` (`(first, last)`:
        this stage's layers first … last-1). The others' share does not travel.

        Raises:
            NotFound, Unauthenticated, InvalidInput, …: the service said so.
            ConnectionFailed: the service did not answer in time.
            InvalidResponse: what arrived is damaged.
        """
        return self.run(flows.get(self._reading, reference, options))

    def get_many(
        self, rows: many.Rows, attention_mask: "Tensor | None" = None, **options: Unpack[PrefixOptions]
    ) -> "MixedPrefix":
        """One batch for many adapters, the rows of one forward pass of a base model that they share.

        A row is a reference as in `get`, a list of them (their prefixes are concatenated in that order), or None (no
        prefix). `attention_mask` is the input's, `[B, S]`, a row each. Options are those of `get`: `dtype` is required
        when stored dtypes differ. Each prefix is fetched once, several at a time, through the local cache; the batch
        is put together here, in memory of its own, and equals what `POST /v1/prefixes` sends.

        Raises:
            NotFound, InvalidReference, …: as `get`; the message names the row.
            InvalidRequest: rows do not agree in layers, heads, head size or dtype, or none has a prefix.
        """
        wanted = many.Wanted.of(rows, options.pop("batch_size", None))
        found = self._get_all(wanted, options)
        return self.run(many.assembled(wanted, found, attention_mask, self._allocate))

    def _get_all(self, wanted: many.Wanted, options: PrefixOptions) -> "dict[str, Prefix]":
        """What is cached without a thread, the rest at the same time."""
        found: dict[str, Prefix] = {}
        begun: dict[str, tuple[Flow[Prefix], Step]] = {}
        for reference in wanted.first_row:
            flow = flows.get(self._reading, reference, options)
            try:
                begun[reference] = flow, next(flow)
            except StopIteration as end:
                found[reference] = end.value
        if not begun:
            return found
        with ThreadPoolExecutor(min(_AT_ONCE, len(begun)), "prefix-rows") as threads:
            fetched = {name: threads.submit(partial(self._finish, *begin)) for name, begin in begun.items()}
        for reference, future in fetched.items():
            try:
                found[reference] = future.result()
            except PrefixServiceError as error:
                raise many.of_row(wanted.first_row[reference], error) from error.__cause__
        return found

    def compose(self, adapter: str, references: Iterable[str]) -> tuple[Mapping[str, Any], bool]:
        """Publish the concatenation of prefixes as a version of `tenant/name`, a CARTRIDGE as PEFT's
        `compose_cartridge_adapters` makes it; what the service says of it, and whether it is new.

        Raises:
            NotFound, InvalidRequest, …: the service said so; nothing was published.
        """
        return self.run(flows.compose(adapter, references))

    def prefetch(
        self, references: Iterable[str], *, concurrency: int = _AT_ONCE, **options: Unpack[PrefixOptions]
    ) -> None:
        """Bring many prefixes into the cache, `concurrency` at once.

        Raises:
            PrefixServiceError: the first, in the order of `references`, that failed, as `get`; the others are there.
        """
        with ThreadPoolExecutor(concurrency, "prefix-prefetch") as threads:
            fetched = [threads.submit(self.get, reference, **options) for reference in references]
            wait(fetched)
        for future in fetched:
            future.result()

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

    def float8_error(self, reference: str) -> "Float8Error":
        """What `dtype="float8_e4m3fn"` costs a version: the largest and the mean error of its keys and values, absolute
        and relative, beside the bytes that it saves. Fetches both renderings.

        Raises:
            NotFound, …: as `get`.
        """
        return self.run(flows.float8_error(self._reading, reference))

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
            step = next(flow)
        except StopIteration as end:
            result: T = end.value
            return result
        return self._finish(flow, step)

    def _finish(self, flow: Flow[T], step: Step) -> T:
        """Carry out a flow that has begun."""
        try:
            while True:
                step = flow.send(self._transport.carry_out(step))
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
        self._transport = AsyncTransport(self._connection, self._fetcher(options))

    async def get(self, reference: str, **options: Unpack[PrefixOptions]) -> "Prefix":
        """As `PrefixClient.get`."""
        return await self.run(flows.get(self._reading, reference, options))

    async def get_many(
        self, rows: many.Rows, attention_mask: "Tensor | None" = None, **options: Unpack[PrefixOptions]
    ) -> "MixedPrefix":
        """As `PrefixClient.get_many`."""
        wanted = many.Wanted.of(rows, options.pop("batch_size", None))
        turns = asyncio.Semaphore(_AT_ONCE)

        async def fetch(reference: str, index: int) -> "Prefix":
            async with turns:
                try:
                    return await self.run(flows.get(self._reading, reference, options))
                except PrefixServiceError as error:
                    raise many.of_row(index, error) from error.__cause__

        fetched = [fetch(reference, index) for reference, index in wanted.first_row.items()]
        found: dict[str, Prefix] = {}
        for reference, done in zip(
            wanted.first_row, await asyncio.gather(*fetched, return_exceptions=True), strict=True
        ):
            if isinstance(done, BaseException):
                raise done
            found[reference] = done
        return await self.run(many.assembled(wanted, found, attention_mask, self._allocate))

    async def compose(self, adapter: str, references: Iterable[str]) -> tuple[Mapping[str, Any], bool]:
        """As `PrefixClient.compose`."""
        return await self.run(flows.compose(adapter, references))

    async def prefetch(
        self, references: Iterable[str], *, concurrency: int = _AT_ONCE, **options: Unpack[PrefixOptions]
    ) -> None:
        """As `PrefixClient.prefetch`."""
        turns = asyncio.Semaphore(concurrency)

        async def fetch(reference: str) -> None:
            async with turns:
                await self.get(reference, **options)

        for failure in await asyncio.gather(*map(fetch, references), return_exceptions=True):
            if failure is not None:
                raise failure

    async def publish(
        self, adapter: str, config: bytes, weights: BinaryIO, base_model_config: bytes | None = None
    ) -> tuple[Mapping[str, Any], bool]:
        """As `PrefixClient.publish`."""
        return await self.run(flows.publish(adapter, config, weights, base_model_config))

    async def inspect(self, reference: str) -> Mapping[str, Any]:
        """As `PrefixClient.inspect`."""
        return await self.run(flows.inspect(reference))

    async def float8_error(self, reference: str) -> "Float8Error":
        """As `PrefixClient.float8_error`."""
        return await self.run(flows.float8_error(self._reading, reference))

    async def list(self, tenant: str, base_model: str | None = None) -> list[Mapping[str, Any]]:
        """As `PrefixClient.list`."""
        return await self.run(flows.list_adapters(tenant, base_model))

    async def is_ready(self) -> bool:
        """As `PrefixClient.is_ready`."""
        return await self.run(flows.is_ready())

    async def run(self, flow: Flow[T]) -> T:
        """As `PrefixClient.run`."""
        try:
            step = next(flow)
            while True:
                step = flow.send(await self._transport.carry_out(step))
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
