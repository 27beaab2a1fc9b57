"""The methods of both clients, written once: each returns a flow, which `PrefixClient` carries out and
`AsyncPrefixClient` awaits.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final, Protocol

from prefix_service.client import options
from prefix_service.client.flows import base_models, flows, listing, many, resolving
from prefix_service.client.flows.flows import Reading
from prefix_service.client.flows.resolving import ResolvedVersion
from prefix_service.client.protocol import Flow, Progress, Together
from prefix_service.errors import PrefixServiceError
from prefix_service.prefix.fingerprint import Fingerprint
from prefix_service.prefix.ranks import Rank
from prefix_service.prefix.variant import KVDtype, Span

if TYPE_CHECKING:
    from torch import Tensor

    from prefix_service.client.prefixes.float8_error import Float8Error
    from prefix_service.client.prefixes.mixed import MixedPrefix
    from prefix_service.client.prefixes.prefix import Prefix

_AT_ONCE: Final = 8


class Caller(Protocol):
    """The part of a client that its calls need."""

    _reading: Reading


def get(
    self: Caller,
    reference: str,
    *,
    batch_size: int = 1,
    dtype: KVDtype | None = None,
    key_dtype: KVDtype | None = None,
    value_dtype: KVDtype | None = None,
    layers: Span | None = None,
    kv_heads: Span | None = None,
    tp: Rank | None = None,
    pp: Span | None = None,
    materialise: bool = False,
    progress: Progress | None = None,
) -> "Flow[Prefix]":
    """Returns the prefix of `tenant/adapter`, `…@7`, `…@alias` or `…@sha256:…`.

    The prefix is the caller's own: no other call sees what is written to it. The service sends one row whatever the
    batch size. The rows of the batch are views of it, so a value that is written to one row is in all of them;
    `materialise` copies them locally, which is faster than sending them.

    Args:
        reference: an adapter, and optionally a version of it; by default the latest.
        batch_size: the number of rows.
        dtype: in which keys and values are sent; by default that of the stored weights. float8 is decoded to float32 on
            arrival.
        key_dtype: in which keys are sent; by default `dtype`. Keys and values that are sent in two dtypes arrive in
            float32, with the values that they had on the wire.
        value_dtype: in which values are sent; by default `dtype`.
        layers: half-open range `(first, end)` of layers; by default all.
        kv_heads: half-open range `(first, end)` of key/value heads; by default all.
        tp: `(rank, size)`: the heads of this tensor-parallel rank as vLLM and Megatron place them, each on several
            ranks if there are more ranks than heads. The heads of other ranks are not sent. Instead of `kv_heads`.
        pp: `(first, end)`: the layers of this pipeline stage. Instead of `layers`.
        materialise: whether each row has memory of its own.
        progress: called with the bytes that have arrived and their total, from the thread that receives them, so it
            should be quick. It is not called if no bytes are sent, as from a cache, and starts again at 0 if the
            request is repeated.

    Raises:
        NotFound, Unauthenticated, InvalidInput, …: the service reported the error.
        InvalidRequest: an option has an invalid value.
        ConnectionFailed: the service did not answer before the deadline.
        InvalidResponse: the answer is damaged, answers another question, or did not come from the service.
    """
    chosen = options.prefix_options(
        batch_size=batch_size,
        dtype=dtype,
        key_dtype=key_dtype,
        value_dtype=value_dtype,
        layers=layers,
        kv_heads=kv_heads,
        tp=tp,
        pp=pp,
        materialise=materialise,
    )
    return flows.get(self._reading, reference, chosen, options.callback("progress", progress))


def get_many(
    self: Caller,
    rows: many.Rows,
    attention_mask: "Tensor | None" = None,
    *,
    batch_size: int | None = None,
    dtype: KVDtype | None = None,
    key_dtype: KVDtype | None = None,
    value_dtype: KVDtype | None = None,
    layers: Span | None = None,
    kv_heads: Span | None = None,
    tp: Rank | None = None,
    pp: Span | None = None,
) -> "Flow[MixedPrefix]":
    """Returns one batch for many adapters: the rows of one forward pass of a base model that they share.

    Each prefix is fetched once, several in parallel, through the local cache. The batch is assembled locally, in memory
    of its own, and equals the answer of `POST /v1/prefixes`.

    Args:
        rows: for each row a reference as in `get`, a list of them (their prefixes are concatenated in that order), or
            None (no prefix).
        attention_mask: the input's, `[B, S]`, with one row per row of the batch.
        batch_size: if given, it must be the number of rows.
        dtype: as in `get`; required if stored dtypes differ.
        key_dtype: as in `get`.
        value_dtype: as in `get`.
        layers: half-open range `(first, end)` of layers; by default all.
        kv_heads: half-open range `(first, end)` of key/value heads; by default all.
        tp: `(rank, size)`: the heads of this tensor-parallel rank. Instead of `kv_heads`.
        pp: `(first, end)`: the layers of this pipeline stage. Instead of `layers`.

    Raises:
        NotFound, InvalidReference, …: the service reported the error, or a reference is malformed; the message names
            the row.
        InvalidRequest: rows differ in layers, heads, head size or dtype, or no row has a prefix.
        ConnectionFailed: the service did not answer before the deadline.
        InvalidResponse: an answer is damaged, answers another question, or did not come from the service.
    """
    wanted = many.Wanted.of(rows, batch_size)
    chosen = options.prefix_options(
        dtype=dtype, key_dtype=key_dtype, value_dtype=value_dtype, layers=layers, kv_heads=kv_heads, tp=tp, pp=pp
    )
    references = list(wanted.first_row)
    fetched = yield Together([flows.shared(self._reading, reference, chosen) for reference in references], _AT_ONCE)
    for reference, result in zip(references, fetched, strict=True):
        if isinstance(result, PrefixServiceError):
            raise many.of_row(wanted.first_row[reference], result) from result.__cause__
    found = dict(zip(references, fetched, strict=True))
    batch: MixedPrefix = yield from many.assembled(wanted, found, attention_mask, self._reading.allocate)
    return batch


def prefetch(
    self: Caller,
    references: Iterable[str],
    *,
    concurrency: int = _AT_ONCE,
    dtype: KVDtype | None = None,
    key_dtype: KVDtype | None = None,
    value_dtype: KVDtype | None = None,
    layers: Span | None = None,
    kv_heads: Span | None = None,
    tp: Rank | None = None,
    pp: Span | None = None,
) -> Flow[None]:
    """Fetches many prefixes into the cache, `concurrency` in parallel; the other arguments are those of `get`.

    Raises:
        PrefixServiceError: the error of the first reference that failed; the other prefixes are cached.
    """
    chosen = options.prefix_options(
        dtype=dtype, key_dtype=key_dtype, value_dtype=value_dtype, layers=layers, kv_heads=kv_heads, tp=tp, pp=pp
    )
    at_once = options.whole("concurrency", concurrency, 1)
    names = dict.fromkeys(options.references(references))
    fetches = [flows.get(self._reading, reference, chosen) for reference in names]
    for result in (yield Together(fetches, at_once)):
        if isinstance(result, PrefixServiceError):
            raise result


def resolve(self: Caller, reference: str) -> Flow[ResolvedVersion]:
    """Returns which version a reference means now, the dimensions of its prefix, and the fingerprint of its base model.
    No tensor travels. The fingerprint, or that there is none, is remembered for a minute.

    Raises:
        NotFound, Unauthenticated, …: the service reported the error.
        ConnectionFailed: the service did not answer before the deadline.
        InvalidResponse: the answer does not describe that version.
    """
    return resolving.resolve(self._reading, reference)


def base_model(self: Caller, reference: str) -> Flow[Fingerprint]:
    """Returns the fingerprint of a version's base model, as it is now: without a field if none was given.

    Raises:
        NotFound, Unauthenticated, …: the service reported it.
        ConnectionFailed: the service did not answer before the deadline.
        InvalidResponse: the answer is no fingerprint.
    """
    return base_models.base_model(reference)


def put_base_model(self: Caller, reference: str, fingerprint: Fingerprint) -> Flow[None]:
    """Replace the fingerprint of a version's base model.

    Raises:
        InvalidRequest: a field has another type.
        NotFound, TooLarge, …: the service reported it; nothing was changed.
        ConnectionFailed: the service did not answer before the deadline.
    """
    known = options.fingerprint("fingerprint", fingerprint).known()
    return base_models.put_base_model(self._reading.fingerprints, reference, known)


def inspect(self: Caller, reference: str) -> Flow[Mapping[str, Any]]:
    """Returns the metadata of a version: config, shapes, parameter counts, digest, size, aliases, residency.

    Raises:
        NotFound, …: the service reported the error.
        ConnectionFailed: the service did not answer before the deadline.
        InvalidResponse: the answer did not come from the service.
    """
    return flows.inspect(reference)


def float8_error(self: Caller, reference: str) -> "Flow[Float8Error]":
    """Returns the error of `dtype="float8_e4m3fn"` for a version, and its size in bytes; fetches both renderings.

    The error is the largest and mean error of its keys and values, absolute and relative.

    Raises:
        NotFound, …: the service reported the error.
        ConnectionFailed: the service did not answer before the deadline.
        InvalidResponse: an answer is damaged, or the two answers do not fit together.
    """
    return flows.float8_error(self._reading, reference)


def list_adapters(
    self: Caller,
    tenant: str,
    base_model: str | None = None,
    *,
    search: str | None = None,
    sort: str | None = None,
    limit: int | None = None,
) -> Flow[list[listing.Item]]:
    """Returns the adapters of a tenant.

    Args:
        tenant: the tenant's name.
        base_model: only adapters whose latest version is for this base model.
        search: only adapters whose names have this part.
        sort: `name` (the default), `-created` (the latest publication first), `-bytes` (the largest first) or `-used`
            (the most requests first).
        limit: at most so many; by default all.

    Raises:
        InvalidRequest: an option has an invalid value.
        NotFound, …: the service reported the error.
        ConnectionFailed: the listing did not end before the deadline.
        InvalidResponse: an answer did not come from the service, or the listing has no end.
    """
    most = None if limit is None else options.whole("limit", limit, 1)
    return listing.adapters(tenant, {"base_model": base_model, "search": search, "sort": sort}, most)


def list_page(
    self: Caller, tenant: str, *, cursor: str | None = None, limit: int = 100
) -> Flow[tuple[list[listing.Item], str | None]]:
    """Returns some adapters of a tenant, in the order of their names, and the cursor of the next page: None if this is
    the last one. `list` reads all pages in one call.

    Args:
        tenant: whose adapters.
        cursor: that of the page, from the page before; by default the first page.
        limit: at most so many adapters, 1,000 or fewer.

    Raises:
        InvalidRequest: an option has a value that it cannot have.
        NotFound, …: the service reported it.
        ConnectionFailed: the service did not answer before the deadline.
        InvalidResponse: the answer is not a page.
    """
    return listing.adapters_page(tenant, cursor, options.whole("limit", limit, 1))


def is_ready(self: Caller) -> Flow[bool]:
    """Returns whether the service is ready.

    Raises:
        Unavailable: the service reports that it is not ready.
        ConnectionFailed: the service did not answer before the deadline.
        InvalidResponse: the answer did not come from the service.
    """
    return flows.is_ready()
