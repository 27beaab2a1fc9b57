"""What the catalog tells: immutable rows."""

import json
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any, Literal

from service.prefix.wire import KVDtype

Scope = Literal["read", "write", "admin"]
SCOPES: tuple[Scope, ...] = ("read", "write", "admin")
"""From the smallest to the largest; each holds those before it."""


@dataclass(frozen=True)
class NewVersion:
    """What publishing puts into the catalog: the manifest, and what was derived from it.

    `weights` and `key_values` are blob digests, sizes are bytes, `weights_dtype` is the dtype of the stored weights.
    """

    digest: str
    manifest: str
    base_model: str | None
    weights: str
    weights_bytes: int
    weights_dtype: KVDtype
    key_values: str
    key_values_bytes: int


@dataclass(frozen=True)
class Version(NewVersion):
    """An immutable version of an adapter."""

    tenant: str
    adapter: str
    number: int
    created: datetime

    @cached_property
    def config(self) -> dict[str, Any]:
        """The adapter's config, dimensions filled."""
        config: dict[str, Any] = json.loads(self.manifest)["config"]
        return config


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter in a listing: its newest version, how many there are, and its aliases."""

    latest: Version
    versions: int
    aliases: dict[str, int]


@dataclass(frozen=True, slots=True)
class Key:
    """A key without its secret; `tenant` is None for a platform key."""

    id: str
    tenant: str | None
    scope: Scope
    name: str
    created: datetime
    expires: datetime | None
    last_used: datetime | None
