"""`PrefixClient` and `AsyncPrefixClient`: the worker's side of the service."""

import asyncio
import hashlib
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from inspect import getdoc
from pathlib import Path
from typing import Any, ClassVar, Self

import httpx

from prefix_service.client import options
from prefix_service.client.base_model_check import BaseModelCheck
from prefix_service.client.cache.cache import LocalCache
from prefix_service.client.cache.disk_cache import DiskCache
from prefix_service.client.flows import calls, management, publishing
from prefix_service.client.flows.as_methods import awaited, blocking, named, plain
from prefix_service.client.flows.flows import Reading
from prefix_service.client.flows.watched import Watched
from prefix_service.client.service_state import ServiceState
from prefix_service.client.transport.connection import Connection
from prefix_service.client.transport.fetcher import Fetcher
from prefix_service.client.transport.foreign import AsyncForeign, Foreign
from prefix_service.client.transport.named_pools import NamedPools
from prefix_service.client.transport.pool import Pool
from prefix_service.client.transport.pools import Pools
from prefix_service.client.transport.transport import AsyncTransport, Transport
from prefix_service.client.watch import OnChange, Watch
from prefix_service.errors import InvalidRequest


class _Client:
    """A client of prefix-service, safe to share between threads.

    It may be used before and after `fork()`: a child opens connections of its own, and keeps what is cached. It can be
    pickled. Unpickling makes a new client from the same arguments, with new connections and an empty cache, so the
    pickle contains the API key, also one that came from the environment: keep it as you keep the key.

    Args:
        base_url: where the service is, `http://…` or `https://…`; by default the environment's `PREFIX_URL`, without
            that `http://127.0.0.1:8080`. With `uds` it may be left out. Replicas of one service may be named all, as a
            list or with commas between them; a name with several addresses names them too.
        api_key: what the service knows the caller by; by default the environment's `PREFIX_API_KEY`. An empty text
            means no key.
        uds: Unix socket to connect to.
        ca_file: certificate authorities to trust.
        timeout: deadline of a call in seconds, with its retries and all of its requests; None for no deadline, which
            also retries until the service answers.
        http: an httpx transport that takes the place of the client's own connections. The deadline of a call is that
            of each of its reads. It takes one URL.
        cache_bytes: budget of the local cache in memory.
        cache_dir: a private folder where bodies are kept too, shared by the processes of this machine. Without a key,
            entries there are always revalidated.
        cache_dir_bytes: its budget.
        verify_digest: whether bodies are compared with their digest: CRC-32C, or SHA-256 from a service that has no
            other; by default unless `uds` is given.
        pin_memory: whether to receive into pinned memory, from which `prefix.to("cuda")` copies fastest.
        connections: bodies of more than 32 MiB are fetched in ranges over so many connections. It pays where one
            connection is slower than the network: a proxy that limits each, a long way, TLS; not on one machine.
        shared_memory: with `uds`, map files that the service has in shared memory instead of receiving them: no copy.
            Not with `pin_memory`.
        base_model_check: what happens if a version's base model, by its fingerprint, is not the model that a prefix is
            given to (`to_cache`, `generate`): `"warn"` (`BaseModelWarning`), `"refuse"` (`BaseModelMismatch`), or
            `"off"`. If a version has a fingerprint, it is asked for after the prefix, at most once a minute, unless it
            is `"off"`; prefixes from `cache_dir` that need no request are not compared.

    Raises:
        InvalidRequest: an argument has a value that it cannot have.
    """

    _foreign: ClassVar[type[httpx.BaseTransport] | type[httpx.AsyncBaseTransport]]

    def __init__(
        self,
        base_url: str | Sequence[str] | None = None,
        api_key: str | None = None,
        *,
        uds: str | Path | None = None,
        ca_file: str | Path | None = None,
        timeout: float | None = 60.0,
        http: httpx.BaseTransport | httpx.AsyncBaseTransport | None = None,
        cache_bytes: int = 1 << 30,
        cache_dir: str | Path | None = None,
        cache_dir_bytes: int = 10 << 30,
        verify_digest: bool | None = None,
        pin_memory: bool = False,
        connections: int = 1,
        shared_memory: bool = True,
        base_model_check: BaseModelCheck = "warn",
    ) -> None:
        base_url, api_key = options.service_urls(base_url, uds), options.service_key(api_key)
        self._arguments = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        self._arguments["api_key"] = api_key or ""  # unpickled elsewhere, it takes no key from that environment
        uds, cache_dir = options.path("uds", uds), options.path("cache_dir", cache_dir)
        ca_file, deadline = options.path("ca_file", ca_file), options.deadline("timeout", timeout)
        if http is not None and not isinstance(http, self._foreign):
            raise InvalidRequest(f"http must be an httpx transport ({self._foreign.__name__}), got {http!r:.100}")
        if http is not None and len(base_url) > 1:
            raise InvalidRequest(f"http takes one URL, and base_url names {len(base_url)}: leave one of them out")
        service = ServiceState()
        connect = partial(Connection, api_key=api_key, uds=uds, ca_file=ca_file, timeout=deadline, service=service)
        named = {connection.address.rstrip("/"): connection for connection in map(connect, base_url)}
        self._connection, self._address = next(iter(named.values())), ", ".join(named)
        self._pools = _pools(named)
        pin_memory = options.flag("pin_memory", pin_memory)
        cache_bytes = options.whole("cache_bytes", cache_bytes, 0)
        if verify_digest is not None:
            options.flag("verify_digest", verify_digest)
        allocate = self._allocator(cache_bytes, pinned=pin_memory)
        self._reading = Reading(
            LocalCache(cache_bytes),
            self._disk_cache(cache_dir, options.whole("cache_dir_bytes", cache_dir_bytes, 0)),
            allocate,
            pinned=pin_memory,
            verify_digest=uds is None if verify_digest is None else verify_digest,
            is_service_known=api_key is not None,
            service=service,
            watched=Watched(service),
            base_model_check=options.base_model_check("base_model_check", base_model_check),
        )
        self._watch: Watch | None = None
        fetcher = Fetcher(
            self._connection,
            self._pools,
            allocate,
            options.whole("connections", connections, 1),
            address=self._address,
            pinned=pin_memory,
            # What is mapped is not pinned.
            shared_memory=options.flag("shared_memory", shared_memory) and uds is not None and not pin_memory,
        )
        self._fetcher = fetcher if http is None else None
        self._open(fetcher, http)

    def _allocator(self, cache_bytes: int, *, pinned: bool) -> Callable[[int], memoryview]:
        """Returns the function that allocates memory for a body of so many bytes."""
        return partial(_allocate, cache_bytes=cache_bytes, pinned=pinned)

    def _open(self, fetcher: Fetcher, http: Any) -> None:
        """Choose the way that requests take."""
        raise NotImplementedError

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), **self._arguments), ()

    def __repr__(self) -> str:
        away = f", away={self._pools.away}" if not isinstance(self._pools, Pool) and self._pools.away else ""
        return f"{type(self).__name__}({self._address!r}{away})"

    def _disk_cache(self, folder: Path | None, budget: int) -> DiskCache | None:
        if folder is None:
            return None
        uds, key = self._connection.uds, self._connection.api_key
        url = self._address if ", " in self._address else str(self._connection.url).rstrip("/")
        secret = None if key is None else hashlib.sha256(key.encode()).hexdigest()
        return DiskCache(folder, budget, (url, None if uds is None else str(uds), secret))

    def watch(self, on_change: OnChange | None = None) -> Watch:
        """Follows the service's changes in a thread, until the client or the returned watch is closed.

        While the service is heard from, aliases and `latest` are served from the cache in memory without a request, and
        what an alias moved to is fetched before it is asked for: of each form that is cached. A silence of 20 seconds,
        or a lost connection, ends that until the service is heard from again. `watch.error` has the error that ended
        the watch, as `Unauthenticated` after the key was revoked; the client then revalidates again.

        Args:
            on_change: called with each `WatchedChange` that the key may see, in the watch's thread, so it should be
                quick.

        Raises:
            InvalidRequest: this client watches already, or has a transport of the caller's own.
        """
        if self._watch is not None and self._reading.watched.is_on:
            raise InvalidRequest("this client watches changes already: close that watch first")
        if self._fetcher is None:
            raise InvalidRequest("a watch needs the client's own connections: leave out http")
        fetching = Transport(self._fetcher, self._connection.timeout)
        call = options.callback("on_change", on_change, "one change")
        self._watch = Watch(self._reading, self._pools, fetching, call)
        weakref.finalize(self, self._watch.close).atexit = False
        return self._watch

    def _end_watch(self) -> None:
        if self._watch is not None:
            self._watch.close()

    def clear_cache(self) -> None:
        """Forget every prefix that was fetched, in memory and in `cache_dir`, there also what other clients fetched,
        and the fingerprints of base models. Only this does: a deletion or a revoked key does not reach into the cache
        of a worker."""
        self._reading.memory.clear()
        self._reading.fingerprints.clear()
        if self._reading.disk is not None:
            self._reading.disk.clear()


@named
class PrefixClient(_Client):
    __doc__ = (
        f"{getdoc(_Client)}\n\nEvery method raises the errors of `prefix_service.errors`. Reads and publishing are "
        "retried when the service is not there or says so. As a context manager it closes its connections at the end."
    )

    _foreign = httpx.BaseTransport

    def _open(self, fetcher: Fetcher, http: Any) -> None:
        way = fetcher if http is None else Foreign(self._connection, http)
        self._transport = Transport(way, self._connection.timeout)

    get = blocking(calls.get)
    get_many = blocking(calls.get_many)
    prefetch = blocking(calls.prefetch)
    resolve = blocking(calls.resolve)
    base_model = blocking(calls.base_model)
    put_base_model = blocking(calls.put_base_model)
    publish = blocking(plain(publishing.publish))
    publish_files = blocking(plain(publishing.publish_files))
    compose = blocking(plain(publishing.compose))
    inspect = blocking(calls.inspect)
    float8_error = blocking(calls.float8_error)
    list = blocking(calls.list_adapters)
    list_page = blocking(calls.list_page)
    is_ready = blocking(calls.is_ready)

    versions = blocking(plain(management.versions))
    delete = blocking(plain(management.delete))
    aliases = blocking(plain(management.aliases))
    put_alias = blocking(plain(management.put_alias))
    delete_alias = blocking(plain(management.delete_alias))
    rollback = blocking(plain(management.rollback))
    parameters = blocking(plain(management.parameters))
    load = blocking(plain(management.load))
    unload = blocking(plain(management.unload))
    residency = blocking(plain(management.residency))
    tenants = blocking(plain(management.tenants))
    tenant = blocking(plain(management.tenant))
    put_tenant = blocking(plain(management.put_tenant))
    delete_tenant = blocking(plain(management.delete_tenant))
    audit = blocking(plain(management.audit))
    whoami = blocking(plain(management.whoami))
    keys = blocking(plain(management.keys))
    key = blocking(plain(management.key))
    create_key = blocking(plain(management.create_key))
    shorten_key = blocking(plain(management.shorten_key))
    revoke_key = blocking(plain(management.revoke_key))
    card = blocking(plain(management.card))
    put_card = blocking(plain(management.put_card))
    annotations = blocking(plain(management.annotations))
    put_annotations = blocking(plain(management.put_annotations))
    config_file = blocking(plain(management.config_file))
    service = blocking(plain(management.service))
    usage = blocking(plain(management.usage))

    def close(self) -> None:
        """Close every connection, and end the watch."""
        self._end_watch()
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


@named
class AsyncPrefixClient(_Client):
    __doc__ = (
        f"{getdoc(_Client)}\n\nThe methods are those of `PrefixClient`, awaitable. Several event loops may use one "
        "client, but only one a transport given as `http`."
    )

    _foreign = httpx.AsyncBaseTransport

    def _open(self, fetcher: Fetcher, http: Any) -> None:
        way = fetcher if http is None else AsyncForeign(self._connection, http)
        self._transport = AsyncTransport(way, self._connection.timeout)

    get = awaited(calls.get)
    get_many = awaited(calls.get_many)
    prefetch = awaited(calls.prefetch)
    resolve = awaited(calls.resolve)
    base_model = awaited(calls.base_model)
    put_base_model = awaited(calls.put_base_model)
    publish = awaited(plain(publishing.publish))
    publish_files = awaited(plain(publishing.publish_files))
    compose = awaited(plain(publishing.compose))
    inspect = awaited(calls.inspect)
    float8_error = awaited(calls.float8_error)
    list = awaited(calls.list_adapters)
    list_page = awaited(calls.list_page)
    is_ready = awaited(calls.is_ready)

    versions = awaited(plain(management.versions))
    delete = awaited(plain(management.delete))
    aliases = awaited(plain(management.aliases))
    put_alias = awaited(plain(management.put_alias))
    delete_alias = awaited(plain(management.delete_alias))
    rollback = awaited(plain(management.rollback))
    parameters = awaited(plain(management.parameters))
    load = awaited(plain(management.load))
    unload = awaited(plain(management.unload))
    residency = awaited(plain(management.residency))
    tenants = awaited(plain(management.tenants))
    tenant = awaited(plain(management.tenant))
    put_tenant = awaited(plain(management.put_tenant))
    delete_tenant = awaited(plain(management.delete_tenant))
    audit = awaited(plain(management.audit))
    whoami = awaited(plain(management.whoami))
    keys = awaited(plain(management.keys))
    key = awaited(plain(management.key))
    create_key = awaited(plain(management.create_key))
    shorten_key = awaited(plain(management.shorten_key))
    revoke_key = awaited(plain(management.revoke_key))
    card = awaited(plain(management.card))
    put_card = awaited(plain(management.put_card))
    annotations = awaited(plain(management.annotations))
    put_annotations = awaited(plain(management.put_annotations))
    config_file = awaited(plain(management.config_file))
    service = awaited(plain(management.service))
    usage = awaited(plain(management.usage))

    async def close(self) -> None:
        """Close every connection, and end the watch."""
        await asyncio.to_thread(self._end_watch)
        await self._transport.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self.close()


def _allocate(size: int, *, cache_bytes: int, pinned: bool) -> memoryview:
    """Returns memory for a body: for one caller if the cache cannot keep it, else for many."""
    from prefix_service.client.cache.memory import allocate, allocate_for_many

    return allocate(size, pinned=pinned) if size > cache_bytes else allocate_for_many(size, pinned=pinned)


def _pools(named: Mapping[str, Connection]) -> Pool | Pools | NamedPools:
    """Returns the way to a service: to one address, to those of one name, or to several that were given."""
    if len(named) > 1:
        return Pools(named)
    (connection,) = named.values()
    return Pool(connection) if connection.uds is not None or connection.is_numeric else NamedPools(connection)
