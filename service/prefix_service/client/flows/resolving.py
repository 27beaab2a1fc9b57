"""Resolves a reference to its version, without fetching tensors."""

from dataclasses import asdict, dataclass

from prefix_service.client.flows import flows
from prefix_service.client.flows.flows import Flow
from prefix_service.prefix.variant import Identity, KVDtype
from prefix_service.prefix.wire.metadata import read_dtype, read_identity


@dataclass(frozen=True, slots=True)
class ResolvedVersion(Identity):
    """The version that a reference means, and the dimensions of its prefix; `dtype` is that of the stored weights."""

    dtype: KVDtype

    @property
    def reference(self) -> str:
        """The version's immutable name, `tenant/adapter@sha256:…`."""
        return f"{self.tenant}/{self.adapter}@{self.digest}"


def resolve(reference: str) -> Flow[ResolvedVersion]:
    """Returns the version that a reference means now.

    Raises:
        InvalidResponse: the answer does not describe a version, or describes another one.
    """
    found = yield from flows.inspect(reference)
    return ResolvedVersion(**asdict(read_identity(found)), dtype=read_dtype(found))
