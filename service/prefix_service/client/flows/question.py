"""The prefix that a client asks for, and the check that an answer is about it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import unquote

from prefix_service.client.options import PrefixOptions
from prefix_service.client.protocol import Answer, Fetch, prefix_request
from prefix_service.errors import InvalidRequest, InvalidResponse
from prefix_service.prefix.ranks import Rank, check_rank, kv_heads_of_rank
from prefix_service.prefix.references import Reference, parse_qualified
from prefix_service.prefix.variant import KVDtype, Layout, Span
from prefix_service.prefix.wire.metadata import read_dtypes

_MISSING = "none"


@dataclass(frozen=True, slots=True)
class Question:
    """A reference, and the variant in which its prefix is wanted. One row is asked for, whatever the batch.

    `tp` stays a rank, since only the service knows how many heads the version has that an alias means now.
    """

    tenant: str
    reference: Reference
    key_dtype: KVDtype | None = None
    value_dtype: KVDtype | None = None
    layers: Span | None = None
    kv_heads: Span | None = None
    tp: Rank | None = None

    @classmethod
    def of(cls, text: str, options: PrefixOptions) -> Self:
        """Returns the question of `client.get(text, **options)`.

        Raises:
            InvalidReference: `text` is not of the form `tenant/adapter@…`.
            InvalidRequest: two options contradict each other.
        """
        tenant, reference = parse_qualified(text)
        layers, kv_heads, tp, pp = (
            options.get("layers"),
            options.get("kv_heads"),
            options.get("tp"),
            options.get("pp"),
        )
        if layers is not None and pp is not None:
            raise InvalidRequest(f"pp={pp} says which layers, and layers={layers} too: give one of them")
        if kv_heads is not None and tp is not None:
            raise InvalidRequest(f"tp={tp} says which heads, and kv_heads={kv_heads} too: give one of them")
        rank = None if tp is None else check_rank(tp)
        dtype = options.get("dtype")
        key, value = options.get("key_dtype") or dtype, options.get("value_dtype") or dtype
        return cls(tenant, reference, key, value, layers if pp is None else pp, kv_heads, rank)

    @property
    def layout(self) -> Layout:
        """The layout that is asked for: one tensor if the dtypes are equal, else a key and a value for each layer."""
        return "stacked" if self.key_dtype == self.value_dtype else "layers"

    @property
    def dtypes(self) -> dict[str, KVDtype]:
        """The dtypes that are asked for, by the names of a request's options. Equal ones are `dtype`, which every
        service knows.
        """
        if self.key_dtype == self.value_dtype:
            return {} if self.key_dtype is None else {"dtype": self.key_dtype}
        both = {"key_dtype": self.key_dtype, "value_dtype": self.value_dtype}
        return {name: dtype for name, dtype in both.items() if dtype is not None}

    @property
    def key(self) -> tuple[Any, ...]:
        """The question as a cache key, of JSON's types alone."""
        adapter, selector = self.reference.adapter, self.reference.selector
        dtypes = self.key_dtype, self.value_dtype
        return (self.tenant, adapter, selector, *dtypes, self.layers, self.kv_heads, self.tp)

    @classmethod
    def of_key(cls, key: tuple[Any, ...]) -> Self:
        """Returns the question of a cache key."""
        tenant, adapter, selector, *form = key
        return cls(tenant, Reference(adapter, selector, explicit=True), *form)

    def request(self, etag: str | None, read: Callable[[Answer], Any], *, is_verified: bool, blocks: bool) -> Fetch:
        """Returns the request that asks the question; with `etag`, it asks whether that answer is still current."""
        return prefix_request(
            self.tenant,
            self.reference,
            layout=self.layout,
            dtypes=self.dtypes,
            layers=self.layers,
            kv_heads=self.kv_heads,
            tp=self.tp,
            etag=etag,
            read=read,
            is_verified=is_verified,
            blocks=blocks,
        )

    def require_answer(self, metadata: Mapping[str, Any], headers: Mapping[str, str]) -> None:
        """Checks that an answer is about this question, by its metadata, which `read_metadata` has accepted, and its
        headers.

        Raises:
            InvalidResponse: the answer is about another question.
        """
        wanted = self._wanted(metadata)
        wrong = [
            f"{name} {metadata[name]!r:.100} instead of {value!r}"
            for name, value in wanted.items()
            if metadata[name] != value
        ]
        found = read_dtypes(metadata)
        for name, dtype, came in (
            ("key_dtype", self.key_dtype, found.key),
            ("value_dtype", self.value_dtype, found.value),
        ):
            if dtype is None and came == "float8_e4m3fn":
                wrong.append(f"{name} {came!r} instead of that of the stored weights")
            elif dtype not in (None, came):
                wrong.append(f"{name} {came!r} instead of {dtype!r}")
        wrong += _headers_that_differ(headers, metadata)
        if wrong:
            raise InvalidResponse(f"the answer is not about {self}: it has {', '.join(wrong)}")

    def require_current(self, etag: str, metadata: Mapping[str, Any], headers: Mapping[str, str]) -> None:
        """Checks that a 304 is about the cached answer with this entity tag and metadata.

        Raises:
            InvalidResponse: it is about another answer.
        """
        wrong = _headers_that_differ(headers, metadata)
        found = headers.get("etag", _MISSING)
        if found.removeprefix("W/") != etag.removeprefix("W/"):  # RFC 9110: If-None-Match compares weakly
            wrong.insert(0, f"entity tag {found:.100} instead of {etag}")
        if wrong:
            raise InvalidResponse(
                f"the 304 is not about the prefix of {self} that is cached: it has {', '.join(wrong)}"
            )

    def _wanted(self, metadata: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the values that the metadata must have; values that the question leaves open are not included."""
        wanted: dict[str, Any] = {"tenant": self.tenant, "adapter": self.reference.adapter}
        if self.reference.version is not None:
            wanted["version"] = self.reference.version
        if self.reference.digest is not None:
            wanted["digest"] = self.reference.digest
        heads = self.kv_heads if self.tp is None else self._heads_of_rank(metadata["num_kv_heads"], self.tp)
        wanted["layers"] = list(self.layers or (0, metadata["num_layers"]))
        wanted["kv_heads"] = list(heads or (0, metadata["num_kv_heads"]))
        return wanted | {"batch_size": 1, "layout": self.layout, "expand": False}

    def _heads_of_rank(self, num_kv_heads: int, tp: Rank) -> Span:
        try:
            return kv_heads_of_rank(num_kv_heads, tp)
        except InvalidRequest as error:
            raise InvalidResponse(f"the answer for {self} is impossible: {error}") from error

    def __str__(self) -> str:
        parts = {**self.dtypes, "layers": self.layers, "kv_heads": self.kv_heads, "tp": self.tp}
        given = [f"{name}={value}" for name, value in parts.items() if value is not None]
        return f"{self.tenant}/{self.reference}" + (f" ({', '.join(given)})" if given else "")


def require_version(found: Any, tenant: str, reference: Reference, location: str | None = None) -> Mapping[str, Any]:
    """Returns the description of a version, after comparing it with the question, and with its `Location` if there is
    one.

    Raises:
        InvalidResponse: it does not describe a version, or describes another one.
    """
    if not isinstance(found, dict) or type(found.get("version")) is not int or not isinstance(found.get("digest"), str):
        raise InvalidResponse(f"the answer for {tenant}/{reference} does not describe a version: {found!r:.200}")
    wanted = {"tenant": tenant, "adapter": reference.adapter, "version": reference.version, "digest": reference.digest}
    wrong = [
        f"{name} {found.get(name)!r:.100} instead of {value!r}"
        for name, value in wanted.items()
        if value is not None and found.get(name) != value
    ]
    path = f"/tenants/{tenant}/adapters/{reference.adapter}@{found['version']}"
    if location is not None and not unquote(location).endswith(path):
        wrong.append(f"Location {location:.200} instead of …{path}")
    if wrong:
        raise InvalidResponse(f"the answer is not about {tenant}/{reference}: it has {', '.join(wrong)}")
    return found


def _headers_that_differ(headers: Mapping[str, str], metadata: Mapping[str, Any]) -> list[str]:
    """Returns the `Prefix-Version` and `Prefix-Digest` that contradict the metadata; a proxy may have removed them."""
    wanted = {"Prefix-Version": str(metadata["version"]), "Prefix-Digest": metadata["digest"]}
    found = {name: headers.get(name.lower()) for name in wanted}
    return [
        f"{name} {found[name]:.100} beside {value}"
        for name, value in wanted.items()
        if found[name] not in (None, value)
    ]
