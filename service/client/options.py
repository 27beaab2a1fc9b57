"""The keyword options of the clients, shared by the blocking and the asynchronous one."""

from pathlib import Path
from typing import TypedDict

import httpx

from service.prefix.form import KVDtype, Span
from service.prefix.ranks import Rank


class ClientOptions(TypedDict, total=False):
    """How to reach a service, and what to keep of it; `PrefixClient` documents each."""

    uds: str | Path | None
    ca_file: str | Path | None
    timeout: float
    http: httpx.BaseTransport | httpx.AsyncBaseTransport | None
    cache_bytes: int
    cache_dir: str | Path | None
    cache_dir_bytes: int
    verify_digest: bool | None
    pin_memory: bool
    connections: int
    shared_memory: bool


class PrefixOptions(TypedDict, total=False):
    """The form in which a prefix is wanted; `PrefixClient.get` documents each."""

    batch_size: int
    dtype: KVDtype | None
    layers: Span | None
    kv_heads: Span | None
    tp: Rank | None
    pp: Span | None
    materialise: bool
