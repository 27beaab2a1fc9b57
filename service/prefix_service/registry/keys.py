"""The identity of what is in memory."""

from typing import NamedTuple

from prefix_service.prefix.variant import KVDtype, Span


class VersionKey(NamedTuple):
    """The identity of what is resident: never a name alone, so that no tenant meets another's tensors, and with the
    digest of the stored keys and values, so that no bits are sent as others. Without it, all that is resident of a
    version is meant."""

    tenant: str
    adapter: str
    version: int
    digest: str
    key_values: str = ""

    @property
    def whole(self) -> "VersionKey":
        """The version, whatever its keys and values are."""
        return self._replace(key_values="")

    def __str__(self) -> str:
        return f"{self.tenant}/{self.adapter}@{self.version}"


class RenderingKey(NamedTuple):
    """The identity of a rendering: a version, and what was made of it."""

    version: VersionKey
    dtype: KVDtype
    layers: Span
    kv_heads: Span
