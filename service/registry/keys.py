"""The identity of what is in memory."""

from typing import NamedTuple

from service.prefix.form import KVDtype, Span


class VersionKey(NamedTuple):
    """The identity of what is resident: never a name alone, so that no tenant meets another's tensors."""

    tenant: str
    adapter: str
    version: int
    digest: str

    def __str__(self) -> str:
        return f"{self.tenant}/{self.adapter}@{self.version}"


class RenderingKey(NamedTuple):
    """The identity of a rendering: a version, and what was made of it."""

    version: VersionKey
    dtype: KVDtype
    layers: Span
    kv_heads: Span
