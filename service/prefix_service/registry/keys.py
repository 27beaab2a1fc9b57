"""The identities of entries in memory."""

from typing import NamedTuple

from prefix_service.prefix.variant import DtypePair, Span


class VersionKey(NamedTuple):
    """The identity of a resident prefix.

    It is never a name alone, so no tenant can receive another's tensors. It includes the digest of the stored keys and
    values, so bits are never sent for others. A key without that digest stands for everything that is resident of a
    version.
    """

    tenant: str
    adapter: str
    version: int
    digest: str
    key_values: str = ""

    @property
    def whole(self) -> "VersionKey":
        """The key of the version, whatever its keys and values are."""
        return self._replace(key_values="")

    def __str__(self) -> str:
        return f"{self.tenant}/{self.adapter}@{self.version}"


class RenderingKey(NamedTuple):
    """The identity of a rendering: a version, and the dtypes and ranges that it was rendered with."""

    version: VersionKey
    dtypes: DtypePair
    layers: Span
    kv_heads: Span
